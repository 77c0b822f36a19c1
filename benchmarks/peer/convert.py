"""The model in each peer's own format, converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from medusa_deploy.runtime.files.bundle import sha256

from .process import PeerError, child_environment, last_line

_GGUF = "model.gguf"


def conversion(form: str, model: Path, output: Path, pythons: Mapping[str, str]) -> list[str]:
    """The command that writes ``model`` into the folder ``output`` in a peer's own format.

    ``model``: a folder of fp32 safetensors; for GGUF in few bits, the F32 GGUF file.
    """
    if form == "gguf":
        return [sys.executable, "-m", "peer.to_gguf", str(model), str(output / _GGUF)]
    if form.startswith("gguf-"):
        kind = form.removeprefix("gguf-")
        return [python_for("llama.cpp", pythons), "-m", "peer.few_bits", str(model), str(output / _GGUF), kind]
    precision = "int8" if form.endswith("-int8") else "fp32"
    if form.startswith("onnxruntime-genai"):
        builder = [python_for("onnxruntime-genai", pythons), "-m", "onnxruntime_genai.models.builder"]
        return [*builder, *("-i", str(model), "-o", str(output), "-p", precision, "-e", "cpu", "-c", str(output / "cache"))]
    assert form.startswith("openvino"), form
    exporter = [pythons.get("optimum-intel") or python_for("openvino-genai", pythons), "-m", "optimum.commands.optimum_cli"]
    task = ("--task", "text-generation-with-past", "--weight-format", precision)
    return [*exporter, "export", "openvino", "--model", str(model), *task, str(output)]


def converted(form: str, model: Path, cache: Path, pythons: Mapping[str, str]) -> Path:
    """The model in a peer's format, converted once for these weights and kept under ``cache``.

    Raises:
        PeerError: the conversion failed.
    """
    folder = cache / fingerprint(model) / form
    if not folder.is_dir():
        log = cache / "logs" / f"convert-{form}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.with_name(f"{form}.{os.getpid()}.partial")
        staged.mkdir(parents=True)
        try:
            source = converted("gguf", model, cache, pythons) if form.startswith("gguf-") else model
            command = conversion(form, source, staged, pythons)
            with log.open("wb") as output:
                ended = subprocess.run(command, stdout=output, stderr=output, check=False, env=child_environment())
            if ended.returncode:
                raise PeerError(f"conversion ended with status {ended.returncode}: {last_line(log)} (see {log})")
            staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder / _GGUF if form.startswith("gguf") else folder


def fingerprint(model: Path) -> str:
    """Twelve digits that name the weights and the configuration of a folder."""
    files = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()[:12]


def python_for(name: str, pythons: Mapping[str, str]) -> str:
    """The interpreter of a system: its own, else the one for all peers, else this one. Ours run in this one unless named."""
    shared = sys.executable if name.startswith("ours") else pythons.get("", sys.executable)
    return pythons.get(name, shared)
