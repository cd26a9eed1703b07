"""Imports run one way: each room uses those before it in the order, and no module of its own comes round again."""

import ast
from pathlib import Path

from tests.support.project import ORDER, PACKAGE


def imports(path):
    """Modules of the package that a file imports, as paths of names."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) + 1 - node.level], *(node.module or "").split("."))
            base = tuple(filter(None, base))
            names = [(*base, alias.name) for alias in node.names]
            yield from [base] if node.module else (name if is_module(name) else (*base, "__init__") for name in names)


def is_module(name):
    path = PACKAGE.joinpath(*name)
    return path.with_suffix(".py").exists() or path.is_dir()


def test_rooms_are_all_in_the_order():
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        *ORDER
    }


def test_imports_run_one_way():
    against = {
        f"{'/'.join(path.relative_to(PACKAGE).parts)} imports {'.'.join(module)}"
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if ORDER.index(module[0]) > ORDER.index(path.relative_to(PACKAGE).with_suffix("").parts[0])
    }
    assert not against


def test_no_module_comes_round_again():
    graph = {
        path.relative_to(PACKAGE).with_suffix("").parts: {
            module if (PACKAGE / Path(*module)).with_suffix(".py").exists() else (*module, "__init__")
            for module in imports(path)
        }
        for path in PACKAGE.rglob("*.py")
    }
    while ends := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in ends}
    assert not graph  # what is left goes round in a circle
