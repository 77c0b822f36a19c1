"""Reads the weights of a GGUF file in transformers' names and order of rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ....runtime.errors import CheckpointError
from .config import family_of
from .metadata import OTHER_FORM, GgufFile
from .rotation import rotation_tensors

_QUERIES, _KEYS = (".attn_q.weight", ".attn_q.bias"), (".attn_k.weight", ".attn_k.bias")


def load_gguf_module(file: GgufFile, config: Any, dtype: torch.dtype) -> Any:
    """Load the causal LM of ``config`` with the file's weights, dequantised to ``dtype``, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model, or has another shape.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, stored in gguf_places(file, empty).items():
        tensor = tensors[name] = torch.empty(file.tensors[stored].shape, dtype=dtype)
        rows, at = tensor.view(-1, tensor.shape[-1]), 0
        for piece in read_pieces(file, config, stored):
            rows[at : at + len(piece)] = torch.from_numpy(piece)
            at += len(piece)
    module = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return module.eval()


def read_pieces(file: GgufFile, config: Any, stored: str) -> Iterator[np.ndarray]:
    """Read a tensor as transformers has it: float32 pieces [rows, columns], one after another; a vector is one row.

    Raises:
        CheckpointError: a format of weights that can't be read.
    """
    family, shape = family_of(file), file.tensors[stored].shape
    heads = None
    if family.permuted and stored.endswith((*_QUERIES, *_KEYS)):
        heads = config.num_attention_heads if stored.endswith(_QUERIES) else config.num_key_value_heads
    size = 1 if heads is None else shape[0] // heads  # rows of a head
    for piece in file.pieces(stored, unit=1 if len(shape) == 1 else size):
        if heads is not None:
            rows = piece.reshape(-1, *shape[1:])
            yield _unpaired(rows, len(rows) // size).reshape(piece.shape)
        elif family.shifted_norms and stored.endswith("norm.weight"):
            yield piece - 1
        else:
            yield piece


def gguf_places(file: GgufFile, empty: Any) -> dict[str, str]:
    """Map each parameter to its tensor in the file, and check that all tensors and shapes fit."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = gguf.get_tensor_name_map(architecture, empty.config.num_hidden_layers)
    places = {}
    for name, parameter in empty.state_dict().items():
        if empty.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        base, kind = name.rsplit(".", 1)
        stored = f"{names.get_name(base)}.{kind}"
        if stored not in file.tensors:
            raise CheckpointError(
                f"{file.path.name} lacks {stored} ({name} of {type(empty).__name__})", hint="download or convert it again"
            )
        shape = file.tensors[stored].shape
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored} in {file.path.name} has the shape {list(shape)}, its metadata says {list(parameter.shape)}",
                hint="download or convert it again",
            )
        places[name] = stored
    unused = sorted(set(file.tensors) - set(places.values()) - rotation_tensors(file))
    if unused:
        raise CheckpointError(
            f"{file.path.name} holds {len(unused)} tensors that {type(empty).__name__} has no place for, such as {unused[0]}",
            hint=OTHER_FORM,
        )
    return places


def _unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of each head from pairs (0, n/2, 1, n/2 + 1, …), as GGUF's llama stores them, into halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
