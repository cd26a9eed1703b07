"""
What the pages of docs/ need besides Markdown: equations without JavaScript, and links that leave the folder.

A Python-Markdown extension for mkdocs.yml, so that it does not depend on what builds the site.
"""

import re
import xml.etree.ElementTree as etree
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

_ROOT = Path(__file__).resolve().parents[1]
# As seen from a page in docs/, and from the top folder
_OFF_SITE = re.compile(r"\.\./|(benchmarks|examples|src|studies|tests|tools)/|CITATION|LICENSE|README")


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
    Links are written for the repository. On the site, those from its top folder into docs/ lose that part, and those
    to files that are not on the site become plain text. All others are left to the check of the build.
    """

    def run(self, root: etree.Element) -> None:
        for image in root.iter("img"):
            image.set("src", image.get("src", "").removeprefix("docs/"))
        for link in root.iter("a"):
            target = link.get("href", "")
            if target.startswith("docs/"):
                link.set("href", target.removeprefix("docs/"))
            elif _OFF_SITE.match(target) and (_ROOT / target.removeprefix("../")).exists():
                link.tag = "span"
                link.attrib.clear()


class SiteMarkdown(Extension):
    """Adds both to a `Markdown` that has pymdownx.arithmatex with `generic: true`."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After inline patterns (20), which make the elements, and before MkDocs resolves links (0)
        md.treeprocessors.register(_Equations(md), "equations", 5)
        md.treeprocessors.register(_Links(md), "links_out_of_docs", 5)


def makeExtension(**settings: object) -> SiteMarkdown:
    """Entry point of Python-Markdown."""
    return SiteMarkdown(**settings)
