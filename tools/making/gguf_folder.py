"""Turns a GGUF file into a model folder that export and other programs read: config, safetensors and tokenizer.

The file may be one that ``prepare`` knows, a path, or a name on a hub. Weights are dequantised a few rows at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that ``prepare`` knows by name. ``gguf``: its file on the hub."""

    title: str
    gguf: str
    sha256: str
    licence: str = "Apache-2.0"


_QWEN = "Qwen/Qwen2.5-Coder-{0}B-Instruct-GGUF:qwen2.5-coder-{0}b-instruct-q4_k_m.gguf"
KNOWN = {
    "qwen2.5-coder-0.5b": KnownModel(
        "Qwen2.5-Coder-0.5B-Instruct", _QWEN.format("0.5"), "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": KnownModel(
        "Qwen2.5-Coder-1.5B-Instruct", _QWEN.format("1.5"), "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


def prepare_gguf(
    model: str,
    output: Path,
    *,
    gguf: Path | None = None,
    force: bool = False,
    report: Callable[[str], object] = lambda phase: None,
) -> dict[str, Any]:
    """Write a model folder and return what was done.

    ``model``: a name in :data:`KNOWN`, a GGUF file, or a name on a hub. ``gguf``: the known model's file, if it is there already.

    Raises:
        MissingDependencyError: an export package isn't installed.
        DownloadError: the hub's file can't be fetched.
        UsageError: ``gguf`` is given for a model that isn't known.
        CheckpointError, UnsupportedArchitectureError: the file can't be read, or isn't the known one.
        BundleExistsError, OutputError: the output can't be written.
    """
    from ...export.hub import fetch_model
    from ...runtime.errors import CheckpointError, UsageError
    from ...runtime.files.bundle import refuse_existing, staged_folder
    from ..extras import require

    require("export")
    known = KNOWN.get(model)
    if gguf is not None and known is None:
        raise UsageError(f"{model} isn't known by name", hint=f"give the file as MODEL; known: smollm2, {', '.join(KNOWN)}")
    refuse_existing(output, force=force)
    started = time.perf_counter()
    fetched = fetch_model(gguf if gguf is not None else model if known is None else known.gguf, report)
    from ...export.backbone.model_folder import find_model

    folder, name = find_model(fetched.path)
    if name is None:
        raise CheckpointError(f"{fetched.path} is no GGUF file", hint="export reads a folder of safetensors as it is")
    if known is not None:
        report("checking the file")
        check_sha256(folder / name, known.sha256, known.gguf)
    provenance: dict[str, Any] = {"source": name, **(fetched.origin or {})}
    if known is not None:
        provenance = {"model": known.title, "licence": known.licence, "source": known.gguf, "sha256": known.sha256, **provenance}
    with staged_folder(output, force=force) as staging:
        convert_gguf(folder / name, staging, report)
        return finish(staging, output, provenance, started)


def finish(staging: Path, output: Path, provenance: dict[str, Any], started: float) -> dict[str, Any]:
    """Write ``provenance.json`` into a finished folder, and report its files."""
    (staging / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", "utf-8")
    files = {path.name: path.stat().st_size for path in sorted(staging.iterdir()) if path.is_file()}
    seconds = time.perf_counter() - started
    return {"output": str(output), "bytes": sum(files.values()), "files": files, "seconds": seconds, **provenance}


def check_sha256(path: Path, expected: str, source: str) -> None:
    """Refuse a file that isn't the known one.

    Raises:
        CheckpointError: missing, or another file.
    """
    from ...runtime.errors import CheckpointError
    from ...runtime.files.bundle import sha256

    if not path.is_file():
        raise CheckpointError(f"no such file: {path}", hint=f"leave out --gguf to fetch {source}")
    digest = sha256(path)
    if digest != expected:
        raise CheckpointError(
            f"{path.name} has {path.stat().st_size} bytes and sha256 {digest[:16]}…, expected {expected[:16]}…",
            hint=f"the file is damaged or another model: take it from {source}, or export the file itself",
        )


def convert_gguf(gguf: Path, output: Path, report: Callable[[str], object]) -> None:
    """Write the config, the weights in float32, and the tokenizer of a GGUF file into a folder.

    Raises:
        CheckpointError, UnsupportedArchitectureError: the file can't be read or mapped.
        OSError: the folder can't be written.
    """
    import torch

    from ...export.backbone.backbone import load_config
    from ...export.backbone.gguf_file.metadata import GgufFile
    from ...export.backbone.linked import empty_module, write_gguf_tensors
    from ...export.backbone.tokenizer import write_text_files

    report("converting")
    file, config = GgufFile(gguf), load_config(gguf, 1)
    text, _ = write_text_files(gguf, config, output)
    eos = list(text.eos_token_ids)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **text.special_tokens}
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos}
    if text.tokenizer is not None:
        _write_json({**settings, "clean_up_tokenization_spaces": False}, output / "tokenizer_config.json")
    _write_json(generation, output / "generation_config.json")
    module = empty_module(config, torch.float32, None)
    config.architectures, config.dtype, config.name_or_path = [type(module).__name__], torch.float32, ""
    config.save_pretrained(output)
    report("writing")
    write_gguf_tensors(file, config, torch.float32, output / "model.safetensors")


def _write_json(fields: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
