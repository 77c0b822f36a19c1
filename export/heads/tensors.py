"""Reads the tensors of a heads checkpoint by name, one at a time, from any kind of file and quantisation."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import torch

from ...runtime.errors import HeadsError
from ...runtime.files.heads_file import read_json
from .names import unwrapped

_PICKLES = (".pt", ".bin", ".pth")
# Files that trainers of transformers and accelerate leave beside the weights.
_TRAINER_FILE = re.compile(r"(?:optimizer|scheduler|scaler|training_args|rng_state|random_states|sampler|dataloader).*")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
# Names of a weight's scale: NVIDIA Model Optimizer's and TensorRT-LLM's.
_SCALES = ("_scale", "s_scaling_factor")
_DAMAGED = "the file is damaged or truncated: download or copy it again"
_Reader = Callable[[str], torch.Tensor]


class TensorFiles:
    """Files of a heads checkpoint. A context manager: files stay open inside it.

    ``parts``: tensor name, without the names of torch's wrappers, to its files. Several files hold the slices of tensor parallel
    ranks, along the first axis and in this order.

    Raises:
        HeadsError: two tensors have one name without their wrappers.
    """

    def __init__(self, parts: Mapping[str, list[Path]]) -> None:
        self.parts: dict[str, list[Path]] = {}
        self._stored: dict[str, str] = {}
        for stored, files in parts.items():
            name = unwrapped(stored)
            if name in self.parts:
                raise HeadsError(f"the checkpoint holds {self._stored[name]} and {stored}", hint="save one of the two")
            self.parts[name], self._stored[name] = files, stored
        self._readers: dict[Path, _Reader] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._readers.clear()
        self._open.close()

    def array(self, name: str, axes: int, *, integer: bool = False) -> np.ndarray:
        """Read a tensor of ``axes`` axes as float16 or float32 (bfloat16 and float8 become float32), or as int64.

        Raises:
            HeadsError: it is unreadable, has another kind or number of axes, or an unknown quantisation.
        """
        slices = [self._slice(name, path) for path in self.parts[name]]
        shapes = [tuple(part.shape) for part in slices]
        if any(len(shape) != axes or 0 in shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise HeadsError(f"{name} has the shape {', '.join(map(str, shapes))}; expected {axes} axes", hint=_DAMAGED)
        if any(part.is_floating_point() is integer for part in slices):
            raise HeadsError(f"{name} is {_name(slices[0])}", hint="weights are floating point, token_map holds integers")
        return np.ascontiguousarray((slices[0] if len(slices) == 1 else torch.cat(slices)).numpy())

    def _slice(self, name: str, path: Path) -> torch.Tensor:
        tensor = self._read(name, path)
        scales = [name + suffix for suffix in _SCALES if name + suffix in self.parts]
        if tensor.dtype in _FLOAT8:
            if not scales:
                raise HeadsError(f"{name} is {_name(tensor)} and has no scale", hint=f"expected {name}{_SCALES[0]} beside it")
            holders = self.parts[scales[0]]
            scale = self._read(scales[0], path if path in holders else holders[0]).float()
            if scale.numel() != 1 and tuple(scale.shape) not in (tensor.shape[:1], (*tensor.shape[:1], 1)):
                raise HeadsError(
                    f"{name} of the shape {tuple(tensor.shape)} has scales of the shape {tuple(scale.shape)}",
                    hint="one scale a tensor or one a row can be read; give the heads before quantisation",
                )
            return tensor.float() * (scale.reshape(-1, 1) if tensor.ndim == 2 else scale.reshape(-1))
        if scales or tensor.dtype not in (*_FLOATS, *_INTEGERS):
            raise HeadsError(
                f"{name} is {_name(tensor)}{' with a scale' if scales else ''}, a quantisation that isn't known",
                hint="give the heads in float16, bfloat16, float32 or scaled float8",
            )
        if tensor.dtype in _INTEGERS:
            return tensor.long()
        return tensor if tensor.dtype is torch.float16 else tensor.float()

    def _read(self, name: str, path: Path) -> torch.Tensor:
        if path not in self._readers:
            self._readers[path] = _pickle_reader(path) if path.suffix in _PICKLES else self._safetensors_reader(path)
        try:
            return self._readers[path](self._stored[name])
        except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise HeadsError(f"{path} doesn't give {name}: {error}", hint=_DAMAGED) from error

    def _safetensors_reader(self, path: Path) -> _Reader:
        try:
            file: Any = self._open.enter_context(safetensors.safe_open(path, framework="pt"))
        except (safetensors.SafetensorError, OSError) as error:
            raise HeadsError(f"{path} can't be read: {error}", hint=_DAMAGED) from error
        read: _Reader = file.get_tensor
        return read


def find_tensors(source: Path) -> TensorFiles:
    """Find the tensors of a file, or of a folder: heads files first, then rank files, then a whole model's shards.

    Raises:
        HeadsError: no tensors, several candidates, an unreadable file, or an index that leads out of the folder.
    """
    if source.is_file():
        return TensorFiles({name: [source] for name in _names(source)})
    if not source.is_dir():
        raise HeadsError(f"no such heads: {source}", hint="give a folder, a .safetensors file or a .pt file")
    for name in ("medusa_lm_head.safetensors", "medusa_lm_head.pt"):
        if (source / name).is_file():
            return find_tensors(source / name)
    ranks = {int(match[1]): path for path in source.iterdir() if (match := re.fullmatch(r"rank(\d+)\.safetensors", path.name))}
    if ranks:
        return _rank_files(source, ranks)
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{single}.index.json"
        if index.is_file():  # older shards may be left beside a single file, which counts
            return find_tensors(source / single) if (source / single).is_file() else _indexed_files(index)
    own = sorted(path for path in source.iterdir() if not _TRAINER_FILE.fullmatch(path.name))
    files = [path for path in own if path.suffix == ".safetensors"] or [path for path in own if path.suffix in _PICKLES]
    if not files:
        raise HeadsError(f"{source} holds no tensors", hint="expected medusa_lm_head.safetensors, .pt, or a model's shards")
    parts: dict[str, list[Path]] = {}
    for path in files:
        for name in _names(path):
            if name in parts:
                raise HeadsError(f"{path.name} and {parts[name][0].name} both hold {name}", hint="name one of the files")
            parts[name] = [path]
    return TensorFiles(parts)


def _rank_files(folder: Path, ranks: dict[int, Path]) -> TensorFiles:
    if sorted(ranks) != list(range(len(ranks))):
        raise HeadsError(f"{folder} holds the ranks {sorted(ranks)}", hint="copy the files of all ranks, from rank0 on")
    parts: dict[str, list[Path]] = {}
    for rank in sorted(ranks):
        for name in _names(ranks[rank]):
            parts.setdefault(name, []).append(ranks[rank])
    return TensorFiles(parts)


def _indexed_files(index: Path) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise HeadsError(f"{index} has no weight_map", hint=_DAMAGED)
    outside = [file for file in weight_map.values() if Path(file).name != file or "\\" in file or file in ("", "..")]
    if outside:
        raise HeadsError(f"{index} names {outside[0]!r}, which isn't a file of its folder", hint="don't use this checkpoint")
    return TensorFiles({name: [index.parent / file] for name, file in weight_map.items()})


def _names(path: Path) -> list[str]:
    if path.suffix in _PICKLES:
        return list(_load_pickle(path))
    if path.suffix != ".safetensors":
        raise HeadsError(f"{path} is a file of unknown kind", hint="give a folder, a .safetensors file or a .pt file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise HeadsError(f"{path} can't be read: {error}", hint=_DAMAGED) from error


def _pickle_reader(path: Path) -> _Reader:
    return _load_pickle(path).__getitem__


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Load a pickled dict of tensors by torch's unpickler for weights, which builds tensors and calls nothing else."""
    compressed = False
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = None if compressed else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # unpickling fails in as many ways as there are damaged files
        if "Weights only load failed" in str(error):
            raise HeadsError(
                f"{path} is a pickle that holds more than tensors, and running it would run its code",
                hint="convert it to safetensors where you trust it: save_file(torch.load(FILE), 'medusa_lm_head.safetensors')",
            ) from error
        raise HeadsError(f"{path} can't be read: {type(error).__name__}", hint=_DAMAGED) from error
    if compressed:
        raise HeadsError(f"{path} is compressed inside, which torch.save never does", hint="don't use this file")
    if not isinstance(loaded, dict) or not all(isinstance(name, str) and _is_plain(value) for name, value in loaded.items()):
        raise HeadsError(f"{path} is not a dict of tensors by name", hint="save the heads' state_dict() alone")
    return {name: value.detach() for name, value in loaded.items()}


def _is_plain(value: object) -> bool:
    """Tell if a value is a dense tensor no larger than its storage (a stride of 0 lets a small file claim any size)."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
