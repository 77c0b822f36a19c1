"""Records of Medusa heads, which the reader, the trainer and the exporter pass on: shape, tensors, Platt scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import HeadsError

HeadKind = Literal["medusa", "grounded"]
Projection = Literal["own", "shared", "pruned"]
PlattScaling = tuple[tuple[float, float], ...]
"""(slope, offset) of each head: log-odds that a candidate is right = slope · log-odds of its probability + offset.

Empty if nobody measured the heads.
"""
MAX_LAYERS = 4096
"""Limit for the layers of all heads together."""
_AGAIN = "convert the heads again from their source, or write them again with: medusa-deploy train"


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Shape of a set of heads.

    ``kind``: ``medusa`` is the paper's form (arXiv 2401.10774, section 2.1.1): blocks ``x + SiLU(W x + b)`` over the
    backbone's last hidden state. ``grounded`` also feeds the embedding of the root token to the first block:
    ``h + SiLU(W [h ; e(root)] + b)``. The root is the token that the step itself emits: it is known when the heads run.

    ``projection``: ``own`` (one for each head), ``shared`` (the backbone's) or ``pruned`` (one over a draft vocabulary).
    """

    kind: HeadKind
    num_heads: int
    num_layers: int
    hidden_size: int
    draft_vocab_size: int
    projection: Projection


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads as numpy arrays under canonical names.

    ================================= ============ ================================================================
    name                              shape        meaning
    ================================= ============ ================================================================
    ``head.{h}.layer.{l}.weight``     [H, H]       [H, 2H] in the first layer of grounded heads
    ``head.{h}.layer.{l}.bias``       [H]
    ``head.{h}.projection.weight``    [V', H]      if ``projection`` is ``own``
    ``token_map``                     int64 [V']   draft index to token id, if the draft vocabulary is pruned
    ``projection.weight``             [V', H]      the pruned projection of all heads; without it they take the
                                                   backbone's rows at ``token_map``
    ================================= ============ ================================================================
    """

    config: HeadConfig
    tensors: Mapping[str, np.ndarray]

    @property
    def token_map(self) -> np.ndarray | None:
        """Draft index to token id, int64 [V']; None if the draft vocabulary is the backbone's."""
        return self.tensors.get("token_map")

    def layer(self, head: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns weight and bias of one residual block."""
        return self.tensors[f"head.{head}.layer.{layer}.weight"], self.tensors[f"head.{head}.layer.{layer}.bias"]

    def digest(self) -> str:
        """Identifies the heads: sha256 (hex) over names, types, shapes and bytes of all tensors."""
        import hashlib

        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = np.ascontiguousarray(self.tensors[name])
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.data)
        return digest.hexdigest()

    def validate(self) -> None:
        """Checks shapes and values against ``config``.

        Raises:
            HeadsError: a tensor is missing, has the wrong shape, or holds NaN or infinite values; or a projection is all zero.
        """
        for name, shape in expected_shapes(self.config, has_token_map=self.token_map is not None).items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise HeadsError(f"heads lack the tensor {name}", hint=_AGAIN)
            if tensor.shape != shape:
                raise HeadsError(f"{name} has shape {tensor.shape}, expected {shape}", hint=_AGAIN)
        for name, tensor in self.tensors.items():
            if tensor.dtype.kind != "f":
                continue
            if not np.isfinite(tensor).all():
                raise HeadsError(
                    f"{name} holds NaN or infinite values", hint="the heads' training diverged, or the file is damaged"
                )
            if name.endswith("projection.weight") and not tensor.any():
                raise HeadsError(f"{name} is all zero", hint="the heads were never trained, or the file is a placeholder")


def expected_shapes(config: HeadConfig, *, has_token_map: bool) -> dict[str, tuple[int, ...]]:
    """Returns the names of the tensors that heads of this shape must have, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden = config.hidden_size
    for head in range(config.num_heads):
        for layer in range(config.num_layers):
            width = 2 * hidden if config.kind == "grounded" and layer == 0 else hidden
            shapes[f"head.{head}.layer.{layer}.weight"] = (hidden, width)
            shapes[f"head.{head}.layer.{layer}.bias"] = (hidden,)
        if config.projection == "own":
            shapes[f"head.{head}.projection.weight"] = (config.draft_vocab_size, hidden)
    if config.projection == "pruned" or has_token_map:
        shapes["token_map"] = (config.draft_vocab_size,)
    return shapes


def config_from_json(raw: Mapping[str, Any]) -> HeadConfig:
    """Reads a :class:`HeadConfig` from its JSON form.

    Raises:
        HeadsError: a field is missing or has a value outside its range.
    """
    try:
        config = HeadConfig(**{name: raw[name] for name in HeadConfig.__dataclass_fields__})
    except KeyError as error:
        raise HeadsError(f"heads config lacks the field {error}", hint=_AGAIN) from None
    if config.kind not in ("medusa", "grounded") or config.projection not in ("own", "shared", "pruned"):
        raise HeadsError(f"unknown head kind {config.kind!r} or projection {config.projection!r}", hint=_AGAIN)
    numbers = (config.num_heads, config.num_layers, config.hidden_size, config.draft_vocab_size)
    if not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in numbers):
        raise HeadsError(f"head counts and sizes must be positive integers, got {numbers}", hint=_AGAIN)
    if config.num_heads * config.num_layers > MAX_LAYERS:
        raise HeadsError(f"{config.num_heads} heads of {config.num_layers} layers: the limit is {MAX_LAYERS}", hint=_AGAIN)
    return config


def parse_platt_scaling(pairs: Any, heads: int) -> PlattScaling:
    """Reads the scaling of ``heads`` heads from JSON: a list of [slope, offset], or an empty list.

    Raises:
        ValueError: ``pairs`` is no such list, a number is not finite, a slope is negative, or their number isn't ``heads``.
    """
    scaling = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        match pair:
            case [float(slope), float(offset)] if slope >= 0 and math.isfinite(slope + offset):
                scaling.append((slope, offset))
            case _:
                raise ValueError(f"platt_scaling holds {pair!r:.40}")
    if len(scaling) not in (0, heads):
        raise ValueError(f"platt_scaling has {len(scaling)} pairs for {heads} heads")
    return tuple(scaling)
