"""
Makes the font of the site's equations, docs/fonts/math.woff2: what equations need of Latin Modern Math.

    pip install fonttools brotli
    python tools/math_font.py latinmodern-math.otf docs/fonts/math.woff2

Without a mathematics font, browsers draw sums and brackets too small and indices on the line.
"""

import sys

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

# The licence asks for another name of what was changed
NAME = "trl_anytime Math"
CHARACTERS = [
    *range(0x20, 0x7F),
    *map(ord, "¬±·×÷¯´¨ˆˇ˘˙˜–—‖…′″‾⃗ℂℎℓℕℚℝℤ←↑→↓↔↦⇐⇒⇔⌈⌉⌊⌋⏞⏟⟨⟩"),
    *range(0x300, 0x315),  # accents
    *range(0x391, 0x3CA),  # Greek
    *map(ord, "ϑϕϵ"),
    *range(0x2061, 0x2065),  # what is not shown: times, commas, function application
    *range(0x2200, 0x2240),  # operators
    *map(ord, "≃≅≈≠≡≤≥≪≫⊂⊃⊆⊇⊕⊗⊤⊥⋅⋮⋯⋱"),
    *range(0x1D434, 0x1D468),  # italic
    *range(0x1D538, 0x1D56C),  # double-struck
    *range(0x1D6E2, 0x1D71C),  # Greek italic
]


def main(source: str, target: str) -> None:
    font = TTFont(source)
    options = Options()
    options.layout_features = ["math", "kern", "mark", "mkmk", "ccmp", "dtls", "flac"]
    options.name_IDs = [0, 1, 2, 3, 4, 5, 6, 13, 14]
    options.drop_tables += ["FFTM"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 3, 4):
            record.string = NAME
        elif record.nameID == 6:
            record.string = NAME.replace(" ", "-")
    outlines = font["CFF "].cff
    outlines.fontNames = [NAME.replace(" ", "-")]
    outlines[0].FullName = outlines[0].FamilyName = NAME
    font.flavor = "woff2"
    font.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
