"""Reads and writes the adapter that heads may need: low-rank changes of the backbone (arXiv 2106.09685), in peft's files.

The adapter lies in the folder ``adapter`` beside the heads. The heads' ``config.json`` has the hashes of its files and a digest
of the backbone that it changes. Adapters are untrusted: weights are safetensors, and a config may hold only plain LoRA over named
linear layers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HeadsError
from .bundle import sha256
from .json_file import read_json_file

FOLDER = "adapter"
FIELD = "adapter"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SAMPLE = 256
"""Numbers of each backbone tensor that go into the digest."""
MAX_RANK = 4096
_MAX_CONFIG_BYTES = 1 << 20
_AGAIN = "copy the whole heads folder again, with its adapter"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_]+")
# Fields of peft's config whose value doesn't matter once the adapter is merged.
_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "megatron_core",
            "peft_version", "qalora_group_size", "revision", "task_type"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraShape:
    """LoRA: weight + ``alpha / rank`` · B A for linear layers whose last name is in ``targets``; A [rank, in], B [out, rank]."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter to be written: the bytes of both files, and the digest of the backbone that it changes."""

    config: bytes
    weights: bytes
    backbone: str

    def field(self) -> dict[str, Any]:
        """Returns the adapter's entry in the heads' config."""
        files = {CONFIG_NAME: self.config, WEIGHTS_NAME: self.weights}
        return {"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, "backbone": self.backbone}

    def write(self, folder: Path) -> None:
        """Writes both files into a new folder."""
        folder.mkdir()
        (folder / CONFIG_NAME).write_bytes(self.config)
        (folder / WEIGHTS_NAME).write_bytes(self.weights)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk. ``files``: sha256 by name. ``backbone``: digest of the backbone that it changes."""

    folder: Path
    files: Mapping[str, str]
    backbone: str
    shape: LoraShape


def read_adapter(heads_folder: Path, config: Mapping[str, Any]) -> Adapter | None:
    """Finds the adapter that the heads in ``heads_folder`` need according to their ``config``. Returns None if they need none.

    Raises:
        HeadsError: the field is malformed; or the adapter is missing, is another one than the heads were trained with, or isn't
            LoRA.
    """
    if FIELD not in config:
        return None
    field = config[FIELD]
    files = field.get("files") if isinstance(field, dict) else None
    backbone = field.get("backbone") if isinstance(field, dict) else None
    hashes = [*files.values(), backbone] if isinstance(files, dict) and set(files) == {CONFIG_NAME, WEIGHTS_NAME} else [None]
    if not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in hashes):
        raise HeadsError(f"the heads' field {FIELD} doesn't have the hashes of an adapter's files and its backbone", hint=_AGAIN)
    assert isinstance(files, dict) and isinstance(backbone, str)
    folder = heads_folder / FOLDER
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise HeadsError(f"the heads need the adapter that they were trained with, and {path} is missing", hint=_AGAIN)
        found = sha256(path)
        if found != expected:
            raise HeadsError(
                f"{path} has sha256 {found[:16]}…, the heads were trained with {expected[:16]}…",
                hint=f"heads and adapter belong together: {_AGAIN}",
            )
    return Adapter(folder, files, backbone, read_lora_shape(folder / CONFIG_NAME))


def read_lora_shape(path: Path) -> LoraShape:
    """Reads rank, alpha and targets from peft's ``adapter_config.json``.

    Raises:
        HeadsError: the file is too large or isn't JSON, the adapter is of another kind, or has a setting that plain LoRA lacks.
    """
    no_config = "this is no config of an adapter"
    raw = read_json_file(path, limit=_MAX_CONFIG_BYTES, error=HeadsError, hint=_AGAIN, too_large=no_config)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise HeadsError(f"{path} describes an adapter of the kind {kind!r:.40}", hint="only LoRA can be merged here")
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise HeadsError(f"{path} has the rank {rank!r:.40}", hint=f"an integer from 1 to {MAX_RANK}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise HeadsError(f"{path} has lora_alpha {alpha!r:.40}", hint="a positive number")
    named = isinstance(targets, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in targets)
    if not named or not targets:
        raise HeadsError(f"{path} has target_modules {targets!r:.80}", hint="a list of names such as q_proj")
    known = {"peft_type", "r", "lora_alpha", "target_modules"} | _NEUTRAL
    others = sorted(name for name, value in raw.items() if name not in known and value not in (None, False, "none", [], {}))
    if others:
        raise HeadsError(
            f"{path} sets {others[0]} to {raw[others[0]]!r:.40}, which plain LoRA doesn't have",
            hint="train the adapter with: medusa-deploy train --stage 2",
        )
    return LoraShape(rank, float(alpha), tuple(sorted(targets)))


def lora_config(shape: LoraShape) -> bytes:
    """Returns the text of peft's ``adapter_config.json``."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shape.targets),
    }
    return (json.dumps(fields, indent=1) + "\n").encode()


def digest_backbone(samples: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """Identifies a backbone: sha256 (hex) over each tensor's name, shape and first ``SAMPLE`` numbers as float32."""
    digest = hashlib.sha256()
    for name, shape, numbers in samples:
        digest.update(f"{name} {shape}".encode())
        digest.update(np.ascontiguousarray(numbers[:SAMPLE], np.float32).data)
    return digest.hexdigest()
