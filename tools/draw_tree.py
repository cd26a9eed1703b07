"""
Draws the packed row of docs/method.md: the rollout in the docstring of `trl_anytime.method.packing`, laid out by the
package.

    python tools/draw_tree.py > docs/images/tree.svg
"""

from trl_anytime.method.packing import PackedRollouts

THINKING, BRIDGE, SUMMARY, UNSEEN = "#5b7db1", "#b9b9b9", "#d98c3f", "#f3f3f3"
CELL, LEFT = 30, 120


def example() -> PackedRollouts:
    """Thinking 1 … 4, cuts after 2 and 4 tokens, bridges 9, two summaries at each cut, of 1, 2, 1 and 1 tokens."""
    return PackedRollouts.pack(
        traces=[[1, 2, 3, 4]], cuts=[[2, 4]], bridges=[[[9], [9]]], summaries=[[[[5], [6, 6]], [[7], [8]]]]
    )


def draw(packed: PackedRollouts) -> str:
    """The first rollout as SVG: the tree by position, the packed row, and what each of its tokens sees."""
    length, num_branches = int(packed.lengths[0]), packed.spans[0, ..., 0].numel()
    branches, positions = packed.branches()[0].tolist(), packed.positions()[0].tolist()
    trained, visible = packed.trained()[0].tolist(), packed.visible()[0].tolist()
    cuts = packed.cuts[0].repeat_interleave(packed.spans.size(2)).tolist()
    colours = [THINKING if branches[t] < 0 else SUMMARY if trained[t] else BRIDGE for t in range(length)]
    names = [f"z{t + 1}" if branches[t] < 0 else "s" if trained[t] else "b" for t in range(length)]

    tree, row = 40, 40 + 36 * (num_branches + 1) + 50
    mask = row + 120
    width, height = LEFT + CELL * length + 20, mask + CELL * length + 60
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def text(x: float, y: float, words: str, attributes: str = "") -> None:
        svg.append(f'<text x="{x:g}" y="{y:g}" {attributes}>{words}</text>')

    def cell(column: int, y: float, colour: str, words: str = "") -> None:
        x = LEFT + CELL * column
        svg.append(f'<rect x="{x}" y="{y:g}" width="{CELL}" height="{CELL}" fill="{colour}" stroke="white"/>')
        if words:
            text(x + CELL / 2, y + 20, words, 'fill="white"' if colour != BRIDGE else "")

    left, right, heading = 'text-anchor="start"', 'text-anchor="end"', 'text-anchor="start" font-weight="bold"'
    text(LEFT, tree - 14, "The tree, by position after the prompt", heading)
    for branch, cut in enumerate(cuts):
        x, y = LEFT + CELL * cut, tree + 36 * (branch + 1) + CELL / 2
        svg.append(f'<path d="M{x - 3} {tree + CELL}V{y:g}H{x}" fill="none" stroke="#888"/>')
        text(LEFT + CELL * 7, y + 5, f"branch {branch + 1} sees z1 … z{cut}", left)
    for t in range(length):
        cell(positions[t], tree + 36 * (branches[t] + 1), colours[t], names[t])

    text(LEFT, row - 14, "The packed row", heading)
    for y, words in ((row + 20, "token"), (row + 50, "position"), (row + 75, "trained")):
        text(LEFT - 10, y, words, right)
    for t in range(length):
        cell(t, row, colours[t], names[t])
        text(LEFT + CELL * (t + 0.5), row + 50, str(positions[t]))
        text(LEFT + CELL * (t + 0.5), row + 75, "yes" if trained[t] else "no")

    text(LEFT, mask - 14, "What each of its tokens sees, besides the prompt", heading)
    for query in range(length):
        text(LEFT - 10, mask + CELL * query + 20, names[query], right)
        for key in range(length):
            cell(key, mask + CELL * query, colours[key] if visible[query][key] else UNSEEN)
    for x, colour, words in ((0, THINKING, "thinking"), (100, BRIDGE, "bridge, inserted"), (240, SUMMARY, "summary")):
        svg.append(f'<rect x="{LEFT + x}" y="{height - 40}" width="16" height="16" fill="{colour}"/>')
        text(LEFT + x + 22, height - 27, words, left)
    return "\n".join([*svg, "</svg>", ""])


if __name__ == "__main__":
    print(draw(example()), end="")
