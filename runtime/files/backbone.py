"""Defines the sizes of a backbone: manifests store them, and exports, caches and plans are computed from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackboneShape:
    """Sizes of a decoder that buffers, caches and heads depend on. ``architecture``: its class in transformers."""

    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def query_size(self) -> int:
        """Numbers of one token's queries: ``attention_heads · head_dim``."""
        return self.attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of one token's keys, or of its values, in one layer: ``kv_heads · head_dim``."""
        return self.kv_heads * self.head_dim

    def cache_bytes(self, rows: int, itemsize: int) -> int:
        """Bytes of one slot's caches: keys and values of ``rows`` rows in all layers, ``itemsize`` bytes a number."""
        return 2 * self.layers * self.key_size * rows * itemsize
