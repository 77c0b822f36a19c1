"""Sizes of the backbones that are measured, as data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..sizing.model_sizes import find_preset


@dataclass(frozen=True, slots=True)
class Shapes:
    """A Llama-shaped backbone. ``lengths``: visible cache rows T that steps are measured at; ``draft_vocab``: of pruned heads."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    lengths: tuple[int, ...] = (512, 2048)
    draft_vocab: int = 8192
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def qkv_rows(self) -> int:
        """Outputs of the merged query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Matrix elements of one layer; its norms are left out."""
        attention = self.hidden * (self.qkv_rows + self.heads * self.head_dim)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def step_parameters(self) -> int:
        """Matrix elements that a plain step reads: all layers and the vocabulary projection, but of the embedding only rows."""
        return self.layers * self.layer_parameters + self.vocab * self.hidden

    def cache_bytes(self, rows: int, itemsize: int) -> int:
        """Bytes of one slot's keys and values over ``rows`` cache rows."""
        return 2 * self.layers * self.kv_heads * self.head_dim * rows * itemsize


def _known(name: str, rope_theta: float = 10000.0) -> Shapes:
    """Of a model size that ``plan`` knows."""
    shape = find_preset(name).shape
    sizes = (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab)
    return Shapes(name, *sizes, rope_theta=rope_theta)


SIZES = {
    shapes.name: shapes
    for shapes in (
        Shapes("tiny", 2, 64, 128, 4, 2, 16, 128, lengths=(128, 256), draft_vocab=32),
        _known("135m", rope_theta=100000.0),
        _known("7b"),
        _known("8b", rope_theta=500000.0),
        _known("13b"),
        _known("33b"),
    )
}
