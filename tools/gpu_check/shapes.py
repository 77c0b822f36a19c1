"""Sizes of the backbones that are measured, as data. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


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


SIZES = {
    shapes.name: shapes
    for shapes in (
        Shapes("tiny", 2, 64, 128, 4, 2, 16, 128, lengths=(128, 256), draft_vocab=32),
        Shapes("135m", 30, 576, 1536, 9, 3, 64, 49152, rope_theta=100000.0),
        Shapes("7b", 32, 4096, 11008, 32, 32, 128, 32000),
        Shapes("8b", 32, 4096, 14336, 32, 8, 128, 128256, rope_theta=500000.0),
        Shapes("13b", 40, 5120, 13824, 40, 40, 128, 32000),
        Shapes("33b", 60, 6656, 17920, 52, 52, 128, 32000),
    )
}
