"""Step time by number of rows, and the tree size that it suggests for the heads' hit rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from ...runtime.executors.step_plan import Wanted
from ...runtime.files.manifest import Manifest
from ...runtime.session import Session
from ...runtime.tree import RankPath, Tree, expected_acceptance_length, tree_of_paths
from .probe import Probe

MOST_ROWS = 16
_CONTEXT = 200


def row_sweep(
    session: Session,
    *,
    sizes: Sequence[int] = range(1, MOST_ROWS + 1),
    rounds: int = 15,
    seed: int = 0,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> dict[str, Any]:
    """Median step time in ms for steps of ``sizes`` rows behind a context of random tokens, sizes interleaved over ``rounds``.

    1 is among the sizes, and sizes that the session can't run are left out.
    One row runs as plain decoding does, without the heads. With path rates in the bundle, ``suggestions`` holds the best tree
    of each size and what it promises over plain decoding, by rates: expected tokens a step ÷ step time.
    """
    manifest = session.manifest
    rng, vocab = np.random.default_rng(seed), manifest.backbone.vocab_size
    context = rng.integers(0, vocab, min(_CONTEXT, manifest.limits.capacity // 2)).tolist()
    # The cost follows the number of rows, not the tree's shape: a root with children.
    trees = [Tree.from_choices([(rank,) for rank in range(rows - 1)]) for rows in sizes if rows <= session.max_rows]
    seconds: list[list[float]] = [[] for _ in trees]
    with Probe(session) as probe:
        probe.prefill(context)
        for turn in range(1 + rounds):
            for index, tree in enumerate(trees):
                tokens = rng.integers(0, vocab, tree.rows).tolist()
                started = time.perf_counter()
                probe.step(tokens, tree, Wanted(heads=tree.rows > 1))
                if turn:  # the first round warms up
                    seconds[index].append(time.perf_counter() - started)
            progress(turn, "")
    milliseconds = {tree.rows: 1e3 * median(times) for tree, times in zip(trees, seconds, strict=True)}
    report: dict[str, Any] = {"context": len(context), "rounds": rounds, "ms_by_rows": milliseconds}
    rates = path_rates(manifest)
    if rates:
        report["suggestions"], report["expected_by"] = suggest(rates, milliseconds), "rates"
    return report


def path_rates(manifest: Manifest) -> dict[RankPath, float]:
    """How often paths of ranks were right on held-out answers, if the heads' maker counted them."""
    heads = manifest.provenance.get("heads")
    pairs = heads.get("path_rates", ()) if isinstance(heads, Mapping) else ()
    return {tuple(path): rate for path, rate in pairs}


def suggest(rates: Mapping[RankPath, float], milliseconds: Mapping[int, float]) -> list[dict[str, Any]]:
    """For each size: the best tree, its expected tokens a step, and the speed-up that follows from the step times.

    A fixed tree, that is: rows that follow the context (:mod:`..runtime.draft`) accept more. A bundle holds rates and not what
    they were counted from, so both are ``OVER_POSITIONS``.
    """
    suggestions = []
    for rows, taken in milliseconds.items():
        tree = tree_of_paths(rates, rows)
        expected = expected_acceptance_length(tree, rates)
        suggestions.append(
            {"rows": rows, "tokens_per_step": expected, "speedup": expected * milliseconds[1] / taken, "choices": tree.choices()}
        )
    return suggestions


def describe_sweep(report: Mapping[str, Any]) -> str:
    """The sweep for a person: one line a size, the best one named."""
    from ..console import table
    from .hit_table import OVER_POSITIONS

    milliseconds = report["ms_by_rows"]
    expected = {entry["rows"]: entry for entry in report.get("suggestions", ())}
    rows = []
    for size, taken in milliseconds.items():
        cells = [size, f"{taken:.2f}", f"{taken / milliseconds[1]:.2f}"]
        entry = expected.get(size)
        rows.append([*cells, f"{entry['tokens_per_step']:.2f}", f"{entry['speedup']:.2f}"] if entry else cells)
    headers = ["rows", "ms a step", "of one row"] + (["expected tokens a step", "expected speed-up"] if expected else [])
    lines = [table(rows, headers)]
    if expected:
        best = max(expected.values(), key=lambda entry: entry["speedup"])
        lines += [f"best size: {best['rows']} rows, {best['speedup']:.2f}× expected", f"expected {OVER_POSITIONS}"]
    else:
        lines.append("the bundle holds no path rates, so no size is suggested")
    return "\n".join(lines)
