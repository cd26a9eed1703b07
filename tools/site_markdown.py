"""
What the pages of docs/ need besides Markdown: equations without JavaScript, links that leave the folder, and files of
the top folder as pages.

A Python-Markdown extension for mkdocs.yml, so that it does not depend on what builds the site.
"""

import re
import xml.etree.ElementTree as etree
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor

_ROOT = Path(__file__).resolve().parents[1]
# As seen from a page in docs/, and from the top folder
_OFF_SITE = re.compile(r"\.\./|(benchmarks|examples|src|studies|tests|tools)/|[A-Z]+\.(cff|md)$|LICENSE")

_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


class _Includes(Preprocessor):
    """
    `<!-- site: NAME -->` … `<!-- end -->` becomes the file of that name in the top folder. What stands between is for
    those who read the page in the repository.
    """

    def run(self, lines: list[str]) -> list[str]:
        included = re.sub(
            r"^<!-- site: (\S+) -->$.*?^<!-- end -->$",
            lambda match: (_ROOT / match[1]).read_text(),
            "\n".join(lines),
            flags=re.DOTALL | re.MULTILINE,
        )
        return included.split("\n")


class _Equations(Treeprocessor):
    """What pymdownx.arithmatex has found becomes MathML, which browsers draw by themselves."""

    def run(self, root: etree.Element) -> None:
        for element in root.iter():
            if element.get("class") == "arithmatex":
                formula = unescape(element.text or "").strip()[2:-2]
                mathml = convert(formula, display="block" if element.tag == "div" else "inline")
                element.text = self.md.htmlStash.store(mathml)


class _Links(Treeprocessor):
    """
    Links are written for the repository. On the site, those from its top folder into docs/ lose that part, those to
    its Markdown files lead to their pages, and those to files that are not on the site become plain text. All others
    are left to the check of the build.
    """

    def run(self, root: etree.Element) -> None:
        for image in root.iter("img"):
            image.set("src", image.get("src", "").removeprefix("docs/"))
        for link in root.iter("a"):
            target = link.get("href", "")
            if target in _PAGES:
                link.set("href", _PAGES[target])
            elif target.startswith("docs/"):
                link.set("href", target.removeprefix("docs/"))
            elif _OFF_SITE.match(target) and (_ROOT / target.removeprefix("../")).exists():
                link.tag = "span"
                link.attrib.clear()


class SiteMarkdown(Extension):
    """Adds all three to a `Markdown` that has pymdownx.arithmatex with `generic: true`."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Includes(md), "includes", 40)  # before fenced code (25)
        # After inline patterns (20), which make the elements, and before MkDocs resolves links (0)
        md.treeprocessors.register(_Equations(md), "equations", 5)
        md.treeprocessors.register(_Links(md), "links_out_of_docs", 5)


def makeExtension(**settings: object) -> SiteMarkdown:
    """Entry point of Python-Markdown."""
    return SiteMarkdown(**settings)
