"""No import circle exists, whether its imports stand at the top of a module or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "src"
PACKAGE = "medusa_deploy"
ROOMS = ("export", "runtime", "calibration", "tools")


def _modules() -> dict[str, Path]:
    """Map the dotted name of every module to its file; a package has the name of its folder."""
    found = {}
    for room in ROOMS:
        folder = (SOURCES / PACKAGE / room).resolve()
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((PACKAGE, room, *(part for part in parts if part != "__init__")))] = path
    return found


def _is_for_types(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements at any depth, except those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_for_types(node):
            for branch in node.orelse:
                yield from _imports(branch)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from _imports(node)


def _targets(node: ast.Import | ast.ImportFrom, package: str, known: Mapping[str, object]) -> Iterator[str]:
    """Yield the modules of ``known`` that a statement in ``package`` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
        return
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *([node.module] if node.module else [])])
    submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in known]
    yield from submodules
    if base in known and len(submodules) < len(node.names):
        yield base


def import_graph(files: Mapping[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Map each module to the modules that it imports. ``files``: name to source; ``packages``: names of ``__init__`` modules."""
    graph = {}
    for name, source in files.items():
        package = name if name in packages else name.rpartition(".")[0]
        graph[name] = {target for node in _imports(ast.parse(source)) for target in _targets(node, package, files)}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Group the modules that reach each other (the strongly connected components)."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += graph[name]
        return found

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}
    return sorted(sorted(group) for group in groups)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = _modules()
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    return import_graph({name: path.read_text("utf-8") for name, path in modules.items()}, packages)


def test_no_import_circle_exists(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


def test_the_graph_has_the_imports_that_are_there(graph: dict[str, set[str]]) -> None:
    assert f"{PACKAGE}.export.backbone.backbone" in graph[f"{PACKAGE}.export.exporter"]
    assert f"{PACKAGE}.runtime.errors" in graph[f"{PACKAGE}.export.backbone.backbone"]
    assert len(graph) > 100


def test_a_lazy_import_makes_a_circle_and_one_for_types_makes_none() -> None:
    lazy = "def later():\n    from .b import thing\n"
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import thing\n"
    for source, expected in ((lazy, [["p.a", "p.b"]]), (for_types, [])):
        assert circles(import_graph({"p": "", "p.a": source, "p.b": "from . import a\n"}, {"p"})) == expected
