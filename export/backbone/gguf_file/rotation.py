"""Reads how a GGUF file's heads rotate by position, in transformers' terms.

llama.cpp rotates the pair i of a head by ``position / factor · base^(−2i/n) / freqs[i]``: ``factor`` and ``base`` are metadata,
``freqs`` is the tensor ``rope_freqs.weight``. transformers' ``longrope`` with equal short and long factors says the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ....runtime.errors import CheckpointError, UnsupportedArchitectureError
from .metadata import OTHER_FORM, GgufFile

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_LOCAL_BASE = 10000.0
_FLOAT32 = 1e-6  # attention factors are stored in float32


def rotation_tensors(file: GgufFile) -> frozenset[str]:
    """Return the names of the tensors that llama.cpp reads for the rotation of this file."""
    if file.architecture == "phi3":
        return frozenset({SHORT, LONG})
    if file.architecture != "llama":
        return frozenset()
    return frozenset({SHORT, LONG} if _kind(file) == "longrope" else {FREQUENCIES})


def rope_parameters(file: GgufFile, head: int, *, partial: bool) -> dict[str, Any]:
    """Return the config fields of the rotation. ``head``: numbers a head. ``partial``: the family can rotate a part of them.

    Raises:
        UnsupportedArchitectureError: a scaling that isn't known, or that transformers' model can't compute.
    """
    rotated = file.size("rope.dimension_count", head)
    if rotated > head or rotated % 2 or (rotated < head and not partial):
        raise UnsupportedArchitectureError(
            f"{file.architecture}.rope.dimension_count is {rotated}, a head has {head} numbers", hint=OTHER_FORM
        )
    context = file.size("context_length")
    rope = {"rope_theta": file.number("rope.freq_base", 10000.0), **_scaling(file, rotated, context)}
    if file.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", _LOCAL_BASE)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    fields: dict[str, Any] = {"rope_parameters": rope}
    if partial:
        rope["partial_rotary_factor"] = fields["partial_rotary_factor"] = rotated / head
        fields["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", context)
    return fields


def _kind(file: GgufFile) -> str:
    return file.text(f"{file.architecture}.rope.scaling.type", "linear")


def _scaling(file: GgufFile, rotated: int, context: int) -> dict[str, Any]:
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0)) or 1.0
    kind = _kind(file)
    original = int(file.number("rope.scaling.original_context_length", context)) or context
    attention = file.number("rope.scaling.attn_factor", 1.0)
    stored = rotation_tensors(file) & file.tensors.keys()
    if file.architecture == "gemma3" and abs(attention - 1) > _FLOAT32:
        raise _refusal(file, f"an attention factor of {attention}")
    if kind == "yarn":
        if stored:
            raise _refusal(file, f"yarn scaling with {min(stored)}")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention * (1 + 0.1 * math.log(max(factor, 1.0))),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
    if kind not in ("none", "linear", "longrope"):
        raise _refusal(file, f"{kind} scaling")
    factor = 1.0 if kind == "none" else factor
    if stored & {SHORT, LONG}:
        short, long = (_factors(file, name, rotated) * np.float32(factor) for name in (SHORT, LONG))
        return _longrope(short, long, original, attention)
    if kind == "longrope":
        raise _refusal(file, "longrope scaling without its tensors")
    if abs(attention - 1) > _FLOAT32:
        raise _refusal(file, f"{kind} scaling with an attention factor of {attention}")
    if FREQUENCIES in stored:
        factors = _factors(file, FREQUENCIES, rotated) * np.float32(factor)
        return _longrope(factors, factors, context, 1.0)
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _longrope(short: np.ndarray, long: np.ndarray, original: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _factors(file: GgufFile, name: str, rotated: int) -> np.ndarray:
    """Read the divisors of the frequencies, one for each pair that rotates."""
    if name not in file.tensors:
        raise CheckpointError(f"{file.path.name} lacks {name}", hint="download or convert it again")
    factors = file.array(name).ravel()
    if len(factors) != rotated // 2 or not np.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(
            f"{name} of {file.path.name} holds {len(factors)} numbers from {factors.min()}; expected {rotated // 2} above 0",
            hint="download or convert it again",
        )
    return factors


def _refusal(file: GgufFile, what: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"{file.path.name} encodes positions by {what}, which isn't read", hint=OTHER_FORM)
