"""Holds one size's random weights, caches and heads, and finds the fastest way to run a step of it here."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....runtime.tree import ROOT_ONLY, Tree
from ...tree_set import published_choices
from ..options import Options
from ..report import OutOfTimeError, Report, describe
from ..shapes import SIZES
from .attention import fused_attention, product_attention
from .clock import Clock
from .loop import Loop
from .step import TorchStep, empty_caches
from .weights import Heads, Weights, random_heads, random_weights

MARGIN = 4
"""K: heads, and the most drafted tokens that a step accepts."""

_TRIAL_REPEATS = 5


class Rig:
    """One size on one device. Weights and caches serve every number of rows and every way to run.

    Ways differ in attention (fused, products) and in whether the parts between are compiled. Each (rows, length) takes the
    fastest, so that plain decoding, which everything is compared with, is as good as this reference can make it. ``notes`` name
    the ways that were tried and left out.
    """

    def __init__(self, size: str, options: Options) -> None:
        self.size, self.shapes, self.options = size, SIZES[size], options
        self.clock = Clock(options.device)
        self.notes: list[str] = []
        self.weights = random_weights(self.shapes, options.device, getattr(torch, options.dtype))
        rows = max(self.shapes.lengths) + 64
        self.caches = empty_caches(self.weights, 1, rows)
        for cache in self.caches:
            cache.normal_()
        self.ways = ways_of(self.weights, self.caches, options)
        self._chosen: dict[tuple[int, int], str] = {}
        self._heads: dict[str, Heads] = {}

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return self.weights.dtype.itemsize

    def heads(self, kind: str) -> Heads:
        """Make four heads with this projection when they are first asked for."""
        if kind not in self._heads:
            self._heads = {kind: random_heads(self.weights, kind, count=MARGIN)}  # one kind at a time saves memory
        return self._heads[kind]

    def step_bytes(self, length: int) -> int:
        """Bytes that a plain step must read: matrices and visible cache rows."""
        return self.shapes.step_parameters * self.itemsize + self.shapes.model.cache_bytes(length, self.itemsize)

    def loop(self, way: str, rows: int, length: int, kind: str | None = None) -> Loop:
        """Make a loop over ``length`` visible cache rows, which are full when the step has run."""
        loop = Loop(self.ways[way], published_tree(rows), length, None if kind is None else self.heads(kind))
        loop.inputs.tokens.random_(0, self.shapes.model.vocab_size)
        self.restart(loop)
        return loop

    def restart(self, loop: Loop, steps: int = 1) -> None:
        """Put ``loop`` where ``steps`` more steps, each with every row accepted, still fit into its visible cache."""
        used = loop.tree.rows + (steps - 1) * (1 + loop.tree.depth if loop.tree.rows > 1 else 1)
        loop.start(loop.visible - MARGIN - used, torch.ones_like(loop.inputs.tokens[:, 0]))

    def time_step(self, rows: int, length: int, kind: str | None = None) -> dict[str, Any]:
        """Time a step of ``rows`` rows behind ``length`` - rows cache rows, closed over itself: median ms and the way it ran."""
        way = self.best_way(rows, length)
        loop = self.loop(way, rows, length, kind)
        replay = self.clock.captured(loop.advance)
        return {**self.clock.measure(replay, self.options.repeats, lambda: self.restart(loop)), "way": way}

    def best_way(self, rows: int, length: int) -> str:
        """Find the fastest way in a short trial. A way that fails is left out from then on, with a note."""
        key = rows, length
        if key not in self._chosen:
            times: dict[str, float] = {}
            for way in list(self.ways):
                try:
                    loop = self.loop(way, rows, length)
                    replay = self.clock.captured(loop.advance)
                    times[way] = self.clock.measure(replay, _TRIAL_REPEATS, lambda loop=loop: self.restart(loop))["ms"]  # type: ignore[misc]
                    del replay  # frees its graph and memory before the next capture
                except Exception as error:
                    if len(self.ways) == 1 or isinstance(error, torch.cuda.OutOfMemoryError):
                        raise
                    del self.ways[way]
                    self.notes.append(f"{way} doesn't run here: {describe(error)}")
            self._chosen[key] = min(times, key=times.__getitem__)
        return self._chosen[key]


def each_size(options: Options, report: Report, measure: Callable[[Rig, Report], None]) -> None:
    """Measure one size after another. One that fails, for lack of memory for instance, doesn't stop the next."""
    for size in options.sizes:
        report.check_time(20)
        try:
            with torch.no_grad():
                measure(Rig(size, options), report)
        except OutOfTimeError:
            raise
        except Exception as error:
            report.skip(size, error)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def ways_of(weights: Weights, caches: list[Tensor], options: Options) -> dict[str, TorchStep]:
    """Build the same step over the same caches with each attention, compiled in between or not."""
    wraps: dict[str, Callable[..., Any] | None] = {"": None}
    if options.compile and options.device == "cuda":
        wraps["compiled, "] = _compile()
    attentions = {"fused attention": fused_attention, "attention by products": product_attention}
    return {
        f"{prefix}{name}": TorchStep(weights, caches, MARGIN, attend, wrap)
        for prefix, wrap in wraps.items()
        for name, attend in attentions.items()
    }


def published_tree(rows: int) -> Tree:
    """Take the first paths of Medusa's published tree of 64 rows, which lists the most valuable ones first."""
    return ROOT_ONLY if rows == 1 else Tree.from_choices(published_choices()[: rows - 1])


def _compile() -> Callable[..., Any]:
    """torch.compile for fixed sizes. Every number of rows compiles once more, and torch's own limit would refuse some."""
    import torch._dynamo as dynamo

    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, 64)
    return lambda function: torch.compile(function, dynamic=False, fullgraph=True)
