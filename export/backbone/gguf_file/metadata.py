"""Opens a GGUF file: its metadata as checked values, and its tensors as float32."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime.errors import CheckpointError
from .header import read_header

OTHER_FORM = "give the model as a folder of safetensors with config.json instead"
_VALUES_AT_A_TIME = 1 << 19
_AGAIN = "download or copy the file again, or convert the model again"


class GgufFile:
    """A GGUF file. ``architecture``: llama.cpp's name of the model's family. Tensors stay on disk until they are asked for.

    Raises:
        CheckpointError: the file is damaged, or one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields, self.tensors, self._data = read_header(path)
        parts = self.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{path} is one of {parts} parts of a model", hint="join them first: llama-gguf-split --merge FIRST-PART OUTPUT"
            )
        self.architecture = self.text("general.architecture")

    def names(self) -> list[str]:
        """Names of all fields of the metadata."""
        return list(self._fields)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value as Python has it, unchecked."""
        return self._fields.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string. Raises CheckpointError if it is missing or something else."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{key} in {self.path} is {value!r:.60}, not a text", hint=_AGAIN)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return the finite number ``architecture.name``. Raises CheckpointError if it is missing or something else."""
        value = self.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.architecture}.{name} in {self.path} is {value!r:.60}, not a number", hint=_AGAIN)
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Return the whole number ``architecture.name``, at least 1; a list counts if all its numbers, one a layer, are equal."""
        key = f"{self.architecture}.{name}"
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise CheckpointError(f"{key} differs between layers: {value!s:.80}", hint=OTHER_FORM)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{key} in {self.path} is {value!r:.60}, not a size", hint=_AGAIN)
        return value

    def token(self, name: str) -> int | None:
        """Return a token id of ``tokenizer.ggml``, or None if the file doesn't have it."""
        value = self.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise CheckpointError(f"tokenizer.ggml.{name}_token_id is {value!r:.60}, not a token id", hint=_AGAIN)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean of the metadata."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{key} in {self.path} is {value!r:.60}, not true or false", hint=_AGAIN)
        return value

    def array(self, name: str) -> np.ndarray:
        """Dequantise a tensor to float32, its rows first.

        Raises:
            CheckpointError: a format of weights that can't be read.
        """
        return np.concatenate(list(self.pieces(name))).reshape(self.tensors[name].shape)

    def pieces(self, name: str, unit: int = 1) -> Iterator[np.ndarray]:
        """Dequantise a tensor to float32 a few rows at a time: pieces [rows, columns] of a multiple of ``unit`` rows.

        Pages of the file that were read leave memory behind the tensor.

        Raises:
            CheckpointError: a format of weights that can't be read.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kinds = {int(kind): kind for kind in GGMLQuantizationType}
        kind = kinds.get(tensor.kind)
        try:
            if kind is None:
                raise NotImplementedError
            if 0 in tensor.shape or not tensor.shape:
                raise ValueError(f"its shape is {list(tensor.shape)}")
            rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
            step = max(unit, _VALUES_AT_A_TIME // columns // unit * unit)
            block, size = GGML_QUANT_SIZES[kind]
            if columns % block:
                raise ValueError(f"rows of {columns} numbers aren't whole blocks of {block}")
            stored = np.frombuffer(self._data, np.uint8, rows * columns // block * size, tensor.offset).reshape(rows, -1)
            for first in range(0, rows, step):
                yield np.asarray(dequantize(stored[first : first + step], kind), np.float32)
        except (NotImplementedError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{name} in {self.path} has the type {kind.name if kind else tensor.kind}, which can't be read: {error}",
                hint="give a file in a usual format: F16, BF16, Q8_0, Q4_K_M …",
            ) from error
        finally:
            self._data.madvise(mmap.MADV_DONTNEED)
