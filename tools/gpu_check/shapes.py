"""Lists the sizes of the backbones that are measured, as data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..sizing.model_sizes import ModelShape, find_preset


@dataclass(frozen=True, slots=True)
class Shapes:
    """A Llama-shaped backbone, and the sizes of its measurement.

    ``lengths``: visible cache rows T of the measured steps. ``draft_vocab``: tokens of pruned heads.
    """

    name: str
    model: ModelShape
    lengths: tuple[int, ...] = (512, 2048)
    draft_vocab: int = 8192
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def qkv_rows(self) -> int:
        """Outputs of the merged query, key and value projection."""
        return self.model.query_size + 2 * self.model.key_size

    @property
    def layer_parameters(self) -> int:
        """Matrix elements of one layer, without its norms."""
        attention = self.model.hidden_size * (self.qkv_rows + self.model.query_size)
        return attention + 3 * self.model.hidden_size * self.model.intermediate_size

    @property
    def step_parameters(self) -> int:
        """Matrix elements that a plain step reads: all layers and the vocabulary projection, but few rows of the embedding."""
        return self.model.layers * self.layer_parameters + self.model.vocab_size * self.model.hidden_size


def _known(name: str, rope_theta: float = 10000.0) -> Shapes:
    """Take a model size that ``plan`` knows."""
    return Shapes(name, find_preset(name).shape, rope_theta=rope_theta)


_TINY = ModelShape("LlamaForCausalLM", 2, 64, 4, 2, 16, 128, 128, 512)
SIZES = {
    shapes.name: shapes
    for shapes in (
        Shapes("tiny", _TINY, lengths=(128, 256), draft_vocab=32),
        _known("135m", rope_theta=100000.0),
        _known("7b"),
        _known("8b", rope_theta=500000.0),
        _known("13b"),
        _known("33b"),
    )
}
