"""Computes the bytes of a deployment's weights, heads, caches and workspace. Takes and returns plain numbers.

Precisions are those of ``build``. ``fp16``: all numbers. ``int8``: the matrices of products, with one fp16 scale an output
channel. ``int4``: half a byte and an fp16 scale for 64 inputs. ``fp8``: one byte. Projection and heads are int8 in both.
Everything else (the embedding's rows, norms, biases, caches) stays fp16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...runtime.executors import step_io
from ...runtime.files.backbone import BackboneShape
from ...runtime.files.heads import HeadConfig, expected_shapes
from .model_sizes import ModelShape

PRECISIONS = ("fp16", "int8", "int4", "fp8")
MEMORIES = (8, 16, 24)
"""GB of the GPUs that a plan is held against in every precision."""
_OF_OTHERS = {"int4": "int8", "fp8": "int8"}
"""Precision of projection and heads where it isn't that of the layers, as ``build`` chooses it."""
_HALF = 2  # bytes
_BLOCK = 64  # inputs that share a scale in int4
# An engine with its weights inside adds at most kernels, and copies of the projection in other layouts.
# Each profile stores the kernels of each layer again: 136 MB for 7 profiles of 32 layers, measured.
_BYTES_PER_PROFILE = 8 * 10**6
_BYTES_PER_PROFILE_AND_LAYER = 500_000
_PROJECTION_COPIES = 2
# Larger fp16 weights are streamed from the bundle's files: building an engine takes twice its size in memory.
_LARGEST_INSIDE = 4 * 10**9
# Matrices with fewer elements stay fp16 in an int8 engine.
_SMALLEST_MATRIX = 1 << 14


@dataclass(frozen=True, slots=True)
class Weights:
    """Counts of elements: ``matrices`` of products, their output ``channels``, and ``others``.

    ``bytes_apart``: bytes of tensors that aren't weights and keep their type (token maps).
    """

    matrices: int = 0
    channels: int = 0
    others: int = 0
    bytes_apart: int = 0

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.matrices + self.others

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.matrices + other.matrices,
            self.channels + other.channels,
            self.others + other.others,
            self.bytes_apart + other.bytes_apart,
        )

    def __mul__(self, times: int) -> Weights:
        return Weights(self.matrices * times, self.channels * times, self.others * times, self.bytes_apart * times)

    def nbytes(self, precision: str) -> int:
        """Bytes in one of :data:`PRECISIONS`."""
        by_precision = {
            "fp16": self.matrices * _HALF,
            "int8": self.matrices + self.channels * _HALF,
            "int4": self.matrices // 2 + self.matrices // _BLOCK * _HALF,
            "fp8": self.matrices,
        }
        return by_precision[precision] + self.others * _HALF + self.bytes_apart


def of_others(precision: str) -> str:
    """Return the precision of projection and heads where the layers have ``precision``."""
    return _OF_OTHERS.get(precision, precision)


def matrix(outputs: int, inputs: int) -> Weights:
    """Count a matrix [outputs, inputs] of a product."""
    if outputs * inputs < _SMALLEST_MATRIX:
        return Weights(others=outputs * inputs)
    return Weights(outputs * inputs, outputs)


@dataclass(frozen=True, slots=True)
class Backbone:
    """Weights of a backbone by part. The vocabulary projection shares the embedding's memory where they are tied."""

    shape: ModelShape
    layers: Weights
    norm: Weights

    @property
    def embedding(self) -> Weights:
        """The table of token embeddings, whose rows are gathered; fp16 in every precision."""
        return Weights(others=self.shape.vocab_size * self.shape.hidden_size)

    @property
    def projection(self) -> Weights:
        """The vocabulary projection, which the logits' product reads."""
        return matrix(self.shape.vocab_size, self.shape.hidden_size)

    @property
    def parameters(self) -> int:
        """Number of parameters as models publish it: a tied projection counts once."""
        projection = 0 if self.shape.tied else self.projection.parameters
        return self.embedding.parameters + self.layers.parameters + self.norm.parameters + projection

    def parts(self, precision: str) -> dict[str, int]:
        """Bytes in memory by part. A tied projection in fp16 is the embedding and adds nothing."""
        shared = self.shape.tied and precision == "fp16"
        return {
            "embedding": self.embedding.nbytes(precision),
            "layers": self.layers.nbytes(precision),
            "norm": self.norm.nbytes(precision),
            "vocabulary projection": 0 if shared else self.projection.nbytes(of_others(precision)),
        }

    def read(self, precision: str) -> int:
        """Bytes that every step reads: all weights except the embedding, of which it reads a few rows."""
        return (self.layers + self.norm).nbytes(precision) + self.projection.nbytes(of_others(precision))


def backbone_of(shape: ModelShape) -> Backbone:
    """Count the weights of a model of this shape."""
    hidden, queries, keys = shape.hidden_size, shape.query_size, shape.key_size
    attention = matrix(queries, hidden) + matrix(keys, hidden) * 2 + matrix(hidden, queries)
    mlp = matrix(shape.intermediate_size, hidden) * 2 + matrix(hidden, shape.intermediate_size)
    vectors = Weights(others=2 * hidden + (queries + 2 * keys if shape.qkv_bias else 0))
    return Backbone(shape, (attention + mlp + vectors) * shape.layers, Weights(others=hidden))


@dataclass(frozen=True, slots=True)
class Heads:
    """Medusa heads: their blocks, and their own projections (none if they use the backbone's)."""

    config: HeadConfig
    blocks: Weights
    projections: Weights

    def nbytes(self, precision: str) -> int:
        """Bytes that the heads add to the backbone's."""
        return (self.blocks + self.projections).nbytes(of_others(precision))

    def read(self, backbone: Backbone, precision: str) -> int:
        """Bytes that the heads read in a step. They read a shared projection again: their input needs its first result."""
        shared = backbone.projection.nbytes(of_others(precision)) if self.config.projection == "shared" else 0
        return self.nbytes(precision) + shared

    def products(self) -> int:
        """Multiplications of the heads for one accepted row."""
        draft = self.config.draft_vocab_size * self.config.hidden_size * self.config.num_heads
        return self.blocks.matrices + draft


def heads_of(config: HeadConfig) -> Heads:
    """Count the weights of heads of this form."""
    blocks, projections = Weights(), Weights()
    for name, shape in expected_shapes(config, has_token_map=False).items():
        if name == "token_map":
            projections += Weights(bytes_apart=8 * shape[0])
        elif name.endswith("projection.weight"):
            projections += matrix(*shape)
        else:
            blocks += matrix(*shape) if len(shape) == 2 else Weights(others=shape[0])
    if config.projection == "pruned":
        projections += matrix(config.draft_vocab_size, config.hidden_size)
    return Heads(config, blocks, projections)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a bundle: ``batch`` slots of ``capacity`` tokens, steps of up to ``max_rows`` rows, and a prefill chunk."""

    capacity: int
    batch: int
    max_rows: int
    prefill_chunk: int

    def at(self, capacity: int | None = None, batch: int | None = None) -> Limits:
        """Copy the limits with another capacity or batch; the prefill chunk stays within the capacity."""
        capacity = self.capacity if capacity is None else capacity
        chunk = min(self.prefill_chunk, capacity)
        return replace(self, capacity=capacity, batch=self.batch if batch is None else batch, prefill_chunk=chunk)


def cache_bytes_per_token(shape: BackboneShape) -> int:
    """Bytes of one token's keys and values in all layers; fp16 in every precision."""
    return shape.cache_bytes(1, _HALF)


def cache_bytes(shape: BackboneShape, num_heads: int, limits: Limits) -> int:
    """Bytes of all slots' caches; fp16 in every precision."""
    rows = step_io.cache_rows(limits.capacity, num_heads, limits.max_rows)
    return shape.cache_bytes(rows, _HALF) * limits.batch


def workspace_bytes(backbone: Backbone, heads: Heads, limits: Limits, precision: str) -> int:
    """Bound the bytes of all memory but weights and caches from above; :data:`WORKSPACE` tells how they are counted."""
    shape, config = backbone.shape, heads.config
    rows = limits.batch * limits.max_rows
    total = step_io.cache_rows(limits.capacity, config.num_heads, limits.max_rows)
    queries, keys = shape.query_size, shape.key_size
    widest = max(rows, limits.prefill_chunk)
    activations = widest * (3 * shape.hidden_size + 2 * queries + 2 * keys + 3 * shape.intermediate_size) * _HALF
    scores = widest * (2 * shape.attention_heads + 1) * total * _HALF
    logits = rows * shape.vocab_size * _HALF + limits.batch * config.num_heads * config.draft_vocab_size * 10
    carried = 2 * rows * cache_bytes_per_token(shape)
    dequantised = 0
    if precision != "fp16":
        dequantised = max(queries, keys, shape.intermediate_size, shape.vocab_size) * shape.hidden_size * _HALF
    return activations + scores + logits + carried + dequantised


WORKSPACE = (
    "an upper estimate, nothing of it was measured: activations of M = max(batch · rows, prefill chunk) rows, "
    "M · (3·hidden + 2·queries + 2·keys + 3·intermediate) · 2 bytes; attention as if it were not fused, "
    "M · (2·heads + 1) · cache rows · 2; logits of all rows and of the heads; the new keys and values of two steps; "
    "in few bits the largest matrix once in fp16"
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the GPU. ``parts``: the backbone's weights by part. ``engine``: bytes of an engine beyond all weights, at most.

    ``weights``: ``inside`` the engine, or ``streamed`` to it from the bundle's files.
    """

    parts: dict[str, int]
    heads: int
    cache: int
    workspace: int
    engine: int
    reserve: int
    weights: str

    @property
    def backbone(self) -> int:
        """Bytes of all of the backbone's weights."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.backbone + self.heads + self.cache + self.workspace + self.engine + self.reserve


def footprint(backbone: Backbone, heads: Heads, precision: str, limits: Limits, profiles: int, reserve: int) -> Footprint:
    """Compute the bytes of an engine with ``profiles`` profiles; ``reserve`` bytes are left to others."""
    parts, head_bytes = backbone.parts(precision), heads.nbytes(precision)
    inside = precision != "fp16" or sum(parts.values()) + head_bytes <= _LARGEST_INSIDE  # few bits are made by the build
    copies = _PROJECTION_COPIES * backbone.projection.nbytes("fp16") if inside else 0
    return Footprint(
        parts,
        head_bytes,
        cache_bytes(backbone.shape, heads.config.num_heads, limits),
        workspace_bytes(backbone, heads, limits, precision),
        copies + profiles * (_BYTES_PER_PROFILE + backbone.shape.layers * _BYTES_PER_PROFILE_AND_LAYER),
        reserve,
        "inside" if inside else "streamed",
    )
