"""Bounds the time of a step on a GPU from below: a roofline of bytes and products over published figures, no measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...runtime.files.heads import HeadConfig, Projection
from .capacity import Backbone, Heads, cache_bytes_per_token, heads_of
from .gpus import Gpu


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """One step of all slots: ``rows`` a slot, bytes that memory delivers, floating-point operations, seconds at least.

    ``bound``: ``bandwidth``, or ``compute`` where the products take longer. ``ratio``: the step's time over the plain step's,
    which is also the mean acceptance length from which Medusa pays. ``tokens_per_second``: of all slots, where the acceptance
    length is known.
    """

    rows: int
    nbytes: int
    flops: int
    seconds: float
    bound: str
    ratio: float = 1.0
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class HeadsEstimate:
    """One form of projection: bytes in memory, bytes read a step, and the Medusa step's ratio to the plain one (None: no GPU)."""

    projection: str
    draft_vocab: int
    nbytes: int
    nbytes_read: int
    ratio: float | None


def estimate_step(
    backbone: Backbone, heads: Heads | None, gpu: Gpu, *, precision: str, rows: int, batch: int, context: int
) -> StepEstimate:
    """Estimate a step of ``rows`` rows over ``batch`` slots that hold ``context`` tokens each; ``heads`` None: plain decoding.

    Memory delivers every weight except the embedding once, and the tokens' keys and values; it takes the new keys and values.
    Heads run at one row a slot. Products are in fp16: weights of few bits are widened first. Those of fp8 may be in fp8, at twice
    the rate.
    """
    shape, token = backbone.shape, cache_bytes_per_token(backbone.shape)
    nbytes = backbone.read(precision) + batch * (context + rows) * token
    products = backbone.layers.matrices + backbone.projection.parameters
    products += 2 * shape.layers * shape.query_size * context
    flops = 2 * batch * rows * products
    if heads is not None:
        nbytes += heads.read(backbone, precision)
        flops += 2 * batch * heads.products()
    by_memory = nbytes / (gpu.bandwidth * 1e9)
    rate = 2 if precision == "fp8" else 1
    by_cores = 0.0 if gpu.fp16 is None else flops / (rate * gpu.fp16 * 1e12)
    bound = "compute" if by_cores > by_memory else "bandwidth"
    return StepEstimate(rows, nbytes, flops, max(by_memory, by_cores), bound)


def compare_heads(
    backbone: Backbone, config: HeadConfig, gpu: Gpu | None, *, precision: str, rows: int, batch: int, context: int
) -> tuple[HeadsEstimate, ...]:
    """Compare the forms of projection for the heads of ``config``: own, shared, and pruned (8192 tokens if ``config`` isn't)."""
    vocab = backbone.shape.vocab_size
    draft = config.draft_vocab_size if config.projection == "pruned" else min(8192, vocab)
    forms: tuple[tuple[Projection, int], ...] = (("own", vocab), ("shared", vocab), ("pruned", draft))
    found = []
    for projection, tokens in forms:
        heads = heads_of(replace(config, projection=projection, draft_vocab_size=tokens))
        ratio = None
        if gpu is not None:
            medusa, plain = (
                estimate_step(backbone, which, gpu, precision=precision, rows=n, batch=batch, context=context).seconds
                for which, n in ((heads, rows), (None, 1))
            )
            ratio = medusa / plain
        found.append(HeadsEstimate(projection, tokens, heads.nbytes(precision), heads.read(backbone, precision), ratio))
    return tuple(found)
