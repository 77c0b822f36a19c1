"""Gathers the trees that a bundle is verified with, and cuts them to the bundle's heads, candidates and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..runtime.errors import TreeError, UsageError
from ..runtime.files.json_file import read_json_file
from ..runtime.files.manifest import Manifest
from ..runtime.tree import ROOT_ONLY, RankPath, Tree, chain

PUBLISHED = "mc_sim_7b_63"
NAMES = ("root", "chain", "published", "narrow", "wide", "random")
_RANDOM_ROWS = 24
MAX_FILE_BYTES = 16 << 20
"""Limit for a tree file. It holds the ranks of everything that was counted: about ten bytes a token."""


@dataclass(slots=True)
class TreeSet:
    """``trees`` by name.

    ``notes``: name to what was cut to make the tree fit. ``skipped``: name to the reason why it is left out.
    """

    trees: dict[str, Tree] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tree: Tree, note: str = "") -> None:
        """Take a tree, or say which one it repeats."""
        twin = next((other for other, known in self.trees.items() if known == tree), None)
        if twin is not None:
            self.skipped[name] = f"{note}; then the same as {twin}" if note else f"the same as {twin}"
            return
        self.trees[name] = tree
        if note:
            self.notes[name] = note


@cache
def published_trees() -> dict[str, list[RankPath]]:
    """Medusa's own trees by their names there. The most valuable path is first, so any beginning of a list is a tree, too."""
    packaged = json.loads((files(__package__) / "published_trees.json").read_text("utf-8"))
    return {name: [tuple(int(rank) for rank in path) for path in paths.split()] for name, paths in packaged["trees"].items()}


def published_choices(name: str = PUBLISHED) -> list[RankPath]:
    """Paths of a published tree; by default the 63 of mc_sim_7b_63, with depths up to 4 and ranks up to 9."""
    return published_trees()[name]


def trees_for(manifest: Manifest, names: Sequence[str] = (), seed: int = 0) -> TreeSet:
    """Gather trees by name or by file; without names, all of ``NAMES`` and the bundle's default tree.

    A tree of ``NAMES`` or a published one that asks for more than the bundle has is cut, and ``notes`` says by how much. A file's
    tree isn't cut.

    Raises:
        UsageError: a name that is neither known, nor a tree of the bundle, nor a file.
        TreeError: a file's tree breaks a rule or doesn't fit.
    """
    heads, limits = manifest.heads, manifest.limits
    result = TreeSet()
    for name in names or (*NAMES, manifest.default_tree):
        if name in NAMES or name in published_trees():
            choices = _named(name, heads.num_heads, heads.top_k, seed)
            result.add(name, *fit(choices, heads.num_heads, heads.top_k, limits.max_rows))
        elif name in manifest.trees:
            result.add(name, manifest.tree(name))
        elif Path(name).is_file():
            result.add(Path(name).stem, read_tree(Path(name), manifest))
        else:
            known = ", ".join(dict.fromkeys((*NAMES, *manifest.trees, *published_trees())))
            raise UsageError(f"no tree {name!r}", hint=f"give one of {known}, or a JSON file of choices such as [[0], [0, 0]]")
    return result


def fit(choices: Sequence[RankPath], heads: int, top_k: int, max_rows: int) -> tuple[Tree, str]:
    """Build the tree of those ``choices`` that a bundle can run, and say what was left out ("" for nothing).

    Paths deeper than ``heads`` or with a rank of ``top_k`` or more go first, then the last ones until ``max_rows`` fits.
    ``choices`` list a path after its prefixes, so the rest stays prefix-closed.
    """
    usable = [path for path in choices if len(path) <= heads and max(path) < top_k]
    kept = usable[: max_rows - 1]
    reasons = []
    if len(usable) < len(choices):
        reasons.append(f"{len(choices) - len(usable)} paths beyond {heads} heads × {top_k} candidates")
    if len(kept) < len(usable):
        reasons.append(f"{len(usable) - len(kept)} paths beyond {max_rows} rows")
    return Tree.from_choices(kept), f"cut: {' and '.join(reasons)}" if reasons else ""


def read_tree(path: Path, manifest: Manifest) -> Tree:
    """Read a tree from a JSON file and check it against the bundle.

    Raises:
        TreeError: no tree, or more than the bundle's heads, candidates or rows.
    """
    tree = read_tree_file(path)
    check_runs(tree, manifest, str(path))
    return tree


def check_runs(tree: Tree, manifest: Manifest, name: str) -> None:
    """Refuse a tree that the bundle can't run; the message calls it ``name``.

    Raises:
        TreeError: more than the bundle's heads, candidates or rows.
    """
    tree.check_fits(manifest.heads.num_heads, manifest.heads.top_k)
    if tree.rows > manifest.limits.max_rows:
        raise TreeError(
            f"{name} has {tree.rows} rows, the bundle allows {manifest.limits.max_rows}",
            hint="prune it, or export with --max-rows",
        )


def read_tree_file(path: Path) -> Tree:
    """Read a tree from a JSON file: a list of paths of ranks, or a file of ``medusa-deploy tree``, which holds it as ``choices``.

    Raises:
        TreeError: missing, too large, or not such a list.
    """
    hint = "give a JSON list of paths of ranks such as [[0], [0, 0]]"
    raw = read_json_file(path, limit=MAX_FILE_BYTES, error=TreeError, hint=hint)
    if isinstance(raw, dict):
        raw = raw.get("choices", raw)
    if not isinstance(raw, list):
        raise TreeError(f"{path} holds a {type(raw).__name__}", hint=hint)
    return Tree.from_choices(raw)


def _named(name: str, heads: int, top_k: int, seed: int) -> Sequence[RankPath]:
    """Choices of a standard tree; prefixes come before the paths that need them."""
    match name:
        case "root":
            return ROOT_ONLY.paths[1:]
        case "chain":
            return chain(heads).paths[1:]
        case "published":
            return published_choices()
        case "narrow":
            return [path for depth in range(heads) for path in ((0,) * depth + (0,), (0,) * depth + (1,))]
        case "wide":
            return [path for rank in range(top_k) for path in ((rank,), (rank, 0))]
        case _ if name in published_trees():
            return published_choices(name)
        case _:
            return _grown(heads, top_k, np.random.default_rng(seed))


def _grown(heads: int, top_k: int, rng: np.random.Generator) -> list[RankPath]:
    """Draw a random prefix-closed set: each new path hangs below any earlier one, with any rank."""
    paths: list[RankPath] = [()]
    for _ in range(100 * _RANDOM_ROWS):
        path = (*paths[rng.integers(len(paths))], int(rng.integers(top_k)))
        if len(path) <= heads and path not in paths:
            paths.append(path)
        if len(paths) == _RANDOM_ROWS:
            break
    return paths[1:]
