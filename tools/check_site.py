"""
Looks at the built site for what a strict build lets pass: docstrings that came out raw, and settings that are missing.

    python tools/check_site.py site
"""

import ast
import re
import sys
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "src" / "trl_anytime" / "brpo_config.py"


# As HTML: a reference in Hugging Face's form, a section of a docstring, an equation, an include
RAW = re.compile(r"\[<code>~?[\w.]+</code>\]|<p>(?:Args|Parameters|Returns|Raises):|\\[(\[]|\$\$|<!-- site:")


def problems(site: Path) -> list[str]:
    """What is wrong, one line each."""
    found = []
    for page in sorted(site.rglob("*.html")):
        # Without code, of which only what could be a reference is looked at
        text = re.sub(
            r"<(script|style|pre).*?</\1>|<code>[^<]*[^\w.~<][^<]*</code>", "", page.read_text(), flags=re.DOTALL
        )
        found += [f"{page}: {match[0]}" for match in RAW.finditer(text)]
    reference = (site / "api" / "training" / "index.html").read_text()
    for name in settings():
        if f'<dt><a id="BRPOConfig.{name}"></a><code>{name}</code>' not in reference:
            found.append(f"The reference of BRPOConfig lacks `{name}`, or the anchor `BRPOConfig.{name}`.")
    return found


def settings() -> list[str]:
    """Fields of BRPOConfig, read without importing it."""
    (config,) = (node for node in ast.parse(CONFIG.read_text()).body if isinstance(node, ast.ClassDef))
    return [
        node.target.id for node in config.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or "The site is as it should be.")
    sys.exit(bool(found))
