"""Reads and writes Medusa heads in this project's own layout: a folder with ``heads.safetensors`` and ``config.json``.

Large heads lie in several files, ``heads-00001-of-00002.safetensors`` and so on: code repositories take files of a few megabytes.
Tensors have the canonical names of :class:`.heads.HeadSet`. ``config.json`` holds ``format``, ``format_version`` and the fields
of :class:`.heads.HeadConfig`. Optional fields:

=================== ====================================================================================================
``tree``            choices of the tree that suits these heads
``trees``           choices of more trees, by name
``platt_scaling``   [slope, offset] of each head (:data:`.heads.PlattScaling`)
``adapter``         hashes of the adapter in the folder ``adapter/`` (:mod:`.adapter_file`)
any other           records of the maker: hit rates, the command and the data that made the heads
=================== ====================================================================================================

Heads of the second training stage need the adapter that they were trained with. Their format version is 2: older programs refuse
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HeadsError, MissingDependencyError, TreeError
from ..tree import Tree
from .adapter_file import FIELD, FOLDER, Adapter, AdapterFiles, read_adapter
from .bundle import staged_folder
from .heads import HeadSet, PlattScaling, config_from_json, expected_shapes, parse_platt_scaling
from .json_file import read_json_file

FORMAT = "medusa-deploy-heads"
FORMAT_VERSION = 2
_WITHOUT_ADAPTER = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "heads.safetensors"
FILE_BYTES = 9_500_000
"""Tensors of more bytes than this are written into several files. A tensor stays whole."""
MAX_CONFIG_BYTES = 16 << 20
_PART = re.compile(r"heads-\d{5}-of-(\d{5})\.safetensors")
_NUMPY_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32"}
_AGAIN = "write the heads again, or copy the whole folder again"


def write_heads(
    heads: HeadSet,
    folder: Path | str,
    extra: Mapping[str, Any] | None = None,
    force: bool = False,
    adapter: AdapterFiles | None = None,
) -> None:
    """Writes ``heads``, the optional fields ``extra`` and the ``adapter`` of the heads into ``folder``, completely or not at all.

    Raises:
        HeadsError: the tensors don't match their config or aren't finite; ``extra`` has a field of the format or a bad scaling.
        TreeError: a tree in ``extra`` breaks a rule or is deeper than the heads.
        BundleExistsError, OutputError: the folder can't be written.
    """
    check_tensors(heads)
    version = _WITHOUT_ADAPTER if adapter is None else FORMAT_VERSION
    config: dict[str, Any] = {"format": FORMAT, "format_version": version, **asdict(heads.config)}
    if adapter is not None:
        config[FIELD] = adapter.field()
    taken = config.keys() & (extra or {}).keys()
    if taken:
        raise HeadsError(f"extra fields {sorted(taken)} are fields of the format", hint="give them other names")
    config.update(extra or {})
    named_trees(config, heads.config.num_heads)
    platt_scaling(config, heads.config.num_heads)
    parts = _parts({name: np.ascontiguousarray(tensor) for name, tensor in heads.tensors.items()})
    with staged_folder(Path(folder), force=force) as staging:
        for number, tensors in enumerate(parts, 1):
            name = TENSORS_NAME if len(parts) == 1 else f"heads-{number:05}-of-{len(parts):05}.safetensors"
            # safetensors' save_file raises an error of its own for a full disk: write the bytes here.
            (staging / name).write_bytes(_safetensors().numpy.save(tensors, metadata={"format": FORMAT}))
        if adapter is not None:
            adapter.write(staging / FOLDER)
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_heads_folder(folder: Path | str) -> HeadSet:
    """Reads heads that :func:`write_heads` wrote, without their adapter. :func:`open_heads_folder` finds that one too."""
    return open_heads_folder(folder)[0]


def open_heads_folder(folder: Path | str) -> tuple[HeadSet, Adapter | None]:
    """Reads heads that :func:`write_heads` wrote, and finds the adapter that they need.

    Raises:
        HeadsError: the folder holds no heads or has a newer format, a file is damaged, the tensors don't match their config, or
            the adapter is missing or another one.
    """
    folder = Path(folder)
    raw = read_heads_config(folder)
    config = config_from_json(raw)
    adapter = read_adapter(folder, raw)
    tensors: dict[str, np.ndarray] = {}
    for path in _files(folder):
        for name, tensor in _read_tensors(path):
            if name in tensors:
                raise HeadsError(f"{path} holds {name}, and a file before it does", hint=_AGAIN)
            tensors[name] = tensor
    heads = HeadSet(config, tensors)
    check_tensors(heads)
    return heads, adapter


def is_tensors_file(name: str) -> bool:
    """Tell whether a file of this name holds heads in this layout."""
    return name == TENSORS_NAME or _PART.fullmatch(name) is not None


def _parts(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Divide tensors, in their order, among files of at most ``FILE_BYTES`` and at least one tensor."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > FILE_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    return parts


def _files(folder: Path) -> list[Path]:
    """Find the files of a folder's tensors: one, or all parts."""
    parts = sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))
    whole = folder / TENSORS_NAME
    if whole.is_file():
        if parts:
            raise HeadsError(f"{folder} holds {TENSORS_NAME} and {parts[0].name}", hint="remove those of other heads")
        return [whole]
    if not parts:
        raise HeadsError(f"{whole} is missing", hint=_AGAIN)
    count = int(parts[0].name.split("-of-")[1][:5])
    for number in range(1, count + 1):
        path = folder / f"heads-{number:05}-of-{count:05}.safetensors"
        if path not in parts:
            raise HeadsError(f"{path} is missing", hint=_AGAIN)
    if len(parts) != count:
        raise HeadsError(f"{folder} holds {len(parts)} files of heads, and {parts[0].name} is one of {count}", hint=_AGAIN)
    return parts


def _read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    library = _safetensors()
    try:
        with library.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in names}
            unusable = sorted(name for name, kind in kinds.items() if kind not in _NUMPY_DTYPES)
            if unusable:
                raise HeadsError(
                    f"{path.name} holds {unusable[0]} as {kinds[unusable[0]]}",
                    hint=f"this layout knows {', '.join(_NUMPY_DTYPES)}",
                )
            for name in names:
                yield name, file.get_tensor(name)
    except (library.SafetensorError, OSError) as error:
        raise HeadsError(f"{path} can't be read: {error}", hint="the file is damaged or truncated: copy it again") from error


def read_heads_config(folder: Path | str) -> dict[str, Any]:
    """Reads ``config.json`` of a heads folder and checks its format and version.

    Raises:
        HeadsError: the file is missing, not JSON, too large, of another format, or of a newer version.
    """
    config = read_json(Path(folder) / CONFIG_NAME)
    if config.get("format") != FORMAT:
        raise HeadsError(
            f"{Path(folder) / CONFIG_NAME} has the format {config.get('format')!r}, not {FORMAT!r}",
            hint="heads of other projects are read by: medusa-deploy export … --heads HEADS",
        )
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise HeadsError(f"{CONFIG_NAME} has format_version {version!r}", hint=_AGAIN)
    if version > FORMAT_VERSION:
        raise HeadsError(
            f"the heads have format version {version}; this program reads up to {FORMAT_VERSION}", hint="upgrade medusa-deploy"
        )
    return config


def named_trees(config: Mapping[str, Any], num_heads: int) -> dict[str, list[list[int]]]:
    """Returns the choices of the trees in a heads config, by name. The field ``tree`` gets the name ``default``.

    Raises:
        HeadsError: a field isn't a list of paths.
        TreeError: a tree breaks a rule or is deeper than the heads.
    """
    trees = config.get("trees", {})
    if not isinstance(trees, Mapping):
        raise HeadsError(f"trees is a {type(trees).__name__}, not an object of named trees", hint=_AGAIN)
    trees = dict(trees)
    if "tree" in config:
        trees["default"] = config["tree"]
    named = {}
    for name, choices in trees.items():
        if not isinstance(choices, list):
            raise HeadsError(f"the tree {name!r} is a {type(choices).__name__}, not a list of paths", hint=_AGAIN)
        tree = Tree.from_choices(choices)
        if tree.depth > num_heads:
            raise TreeError(
                f"the tree {name!r} is {tree.depth} deep, and there are {num_heads} heads",
                hint=f"drop its paths longer than {num_heads}",
            )
        named[name] = tree.choices()
    return named


def platt_scaling(config: Mapping[str, Any], num_heads: int) -> PlattScaling:
    """Returns slope and offset of each head from a heads config; an empty tuple if the config has none.

    Raises:
        HeadsError: the field isn't a list with one pair for each head, or a slope is negative.
    """
    try:
        return parse_platt_scaling(config.get("platt_scaling", []), num_heads)
    except ValueError as error:
        raise HeadsError(str(error), hint="a list of pairs such as [0.7, -1.0], one a head") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file.

    Raises:
        HeadsError: the file is missing, not a JSON object, or over ``MAX_CONFIG_BYTES``.
    """
    config = read_json_file(path, error=HeadsError, hint=_AGAIN, limit=MAX_CONFIG_BYTES, too_large="this is no config of heads")
    if not isinstance(config, dict):
        raise HeadsError(f"{path} is a JSON {type(config).__name__}, not an object", hint=_AGAIN)
    return config


def check_tensors(heads: HeadSet) -> None:
    """Checks heads as :meth:`.heads.HeadSet.validate` does; refuses tensors without a meaning, and an unusable ``token_map``.

    Raises:
        HeadsError: a check fails. The message has the tensor's name.
    """
    heads.validate()
    config, token_map = heads.config, heads.token_map
    shapes = expected_shapes(config, has_token_map=token_map is not None)
    if config.projection == "pruned":
        shapes["projection.weight"] = (config.draft_vocab_size, config.hidden_size)
    for name, tensor in heads.tensors.items():
        if name not in shapes:
            what = f"which {config.kind} heads with a {config.projection} projection don't have"
            raise HeadsError(f"the heads hold {name}, {what}", hint=_AGAIN)
        if tensor.shape != shapes[name]:
            raise HeadsError(f"{name} has shape {tensor.shape}, expected {shapes[name]}", hint=_AGAIN)
        expected = "i" if name == "token_map" else "f"
        if tensor.dtype.kind != expected:
            raise HeadsError(f"{name} has the dtype {tensor.dtype}", hint="weights are floating point, token_map is int64")
    if token_map is None:
        return
    if token_map.dtype != np.int64:
        raise HeadsError(f"token_map has the dtype {token_map.dtype}, expected int64", hint=_AGAIN)
    if config.projection == "shared":
        raise HeadsError(
            "token_map stands beside a shared projection", hint="a pruned draft vocabulary is the projection 'pruned'"
        )
    if token_map.min() < 0:
        raise HeadsError(f"token_map holds the token id {token_map.min()}", hint="token ids start at 0")
    if len(np.unique(token_map)) != len(token_map):
        raise HeadsError("token_map holds a token id twice", hint="list every token id of the draft vocabulary once")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors isn't installed", hint="install it with: pip install 'medusa-deploy[export]'"
        ) from error
    return safetensors
