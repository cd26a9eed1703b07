"""
Docstrings in Hugging Face's form as Markdown for the API reference: a griffe extension for mkdocs.yml.

A section such as `Args:` becomes a heading in bold and a definition list; a reference such as [`~trl.GRPOTrainer`]
becomes a link to its place in the reference, or its name as code where it has none.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Parameters|Returns|Raises|Example):[ ]*(.*)\n((?:[ ]+.*\n|\n)*)", re.MULTILINE)
_ITEM = re.compile(r"^(\S+?)( \(.*\))?:\n((?:[ ]+.*\n|\n)*)", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
_TITLES = {"Args": "Arguments", "Parameters": "Settings"}
_ELSEWHERE = {
    "trl.GRPOConfig": "https://huggingface.co/docs/trl/en/grpo_trainer#trl.GRPOConfig",
    "trl.GRPOTrainer": "https://huggingface.co/docs/trl/en/grpo_trainer#trl.GRPOTrainer",
}


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring of the package, once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        items = list(_items(pkg))
        paths = [item.path for item in items]
        for item in items:
            if item.docstring is not None:
                item.docstring.value = to_markdown(item.docstring.value, paths, item.name)


def _items(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Module | griffe.Class):
            yield from _items(member)
        elif isinstance(member, griffe.Object):
            yield member


def to_markdown(docstring: str, paths: Sequence[str], owner: str = "") -> str:
    """
    Args:
        docstring (`str`):
            A docstring in Hugging Face's form, without common indentation.
        paths (`Sequence[str]`):
            Full name of everything in the package.
        owner (`str`, *optional*):
            Name of what has the docstring. Its settings get anchors such as `BRPOConfig.budgets`.
    """
    # Every other part of the split is code. In the rest, formulas are meant as they stand
    parts = re.split(r"(```.*?```|`[^`]*`)", docstring + "\n", flags=re.DOTALL)
    parts[::2] = [re.sub(r"([_{}]|\](?=\[))", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    text = _REFERENCE.sub(lambda match: _link(match[2], bool(match[1]), paths), "".join(parts))
    return _SECTION.sub(lambda match: _section(match, owner), text)


def _section(match: re.Match[str], owner: str) -> str:
    name, first_line, body = match.groups()
    body = textwrap.dedent(body)
    if name in _TITLES:
        place = owner if name == "Parameters" else None
        body = _ITEM.sub(lambda item: _item(item, place), body)
        body = re.sub(r"^> (.+)$", r"*\1*", body, flags=re.MULTILINE)  # BRPOConfig groups its settings
    return f"**{_TITLES.get(name, name)}**\n\n{first_line}\n\n{body}\n"


def _item(match: re.Match[str], owner: str | None) -> str:
    name, kind, description = match[1].replace("\\", ""), match[2] or "", match[3]
    anchor = "" if owner is None else f'<a id="{owner}.{name}"></a>'
    return f"{anchor}`{name}`{kind}\n\n:   {textwrap.indent(textwrap.dedent(description), '    ').strip()}\n\n"


def _link(name: str, short: bool, paths: Sequence[str]) -> str:
    title = name.rpartition(".")[2] if short else name
    if name in _ELSEWHERE:
        return f"[`{title}`]({_ELSEWHERE[name]})"
    found = min((path for path in paths if f".{path}".endswith(f".{name}")), key=len, default=None)
    if found is None:
        return f"`{title}`"
    # Optional: most of what is not public has no place in the reference
    return f'<autoref optional identifier="{found}"><code>{title}</code></autoref>'
