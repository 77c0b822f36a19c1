"""Names the distributions of each extra, and raises a named error when one is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys

_CPU = ("onnxruntime", "tokenizers", "minijinja")
_EXPORT = (*_CPU, "accelerate", "gguf", "onnx", "onnx-ir", "onnxscript", "safetensors", "torch", "transformers")
# The distributions of the extras in pyproject.toml that add abilities.
EXTRAS = {
    "cpu": _CPU,
    "gpu": ("onnxruntime-gpu", "tokenizers", "minijinja"),
    "calibrate": (*_CPU, "onnx", "onnx-ir"),
    "debug": (*_CPU, "onnx", "onnx-graphsurgeon", "onnx-ir", "polygraphy"),
    "export": _EXPORT,
    "figure": ("matplotlib",),
    "guided": ("llguidance",),
    "otel": ("opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    "serve": (*_CPU, "msgspec", "prometheus-client", "starlette", "uvicorn"),
    "ray": (*_CPU, "msgspec", "prometheus-client", "starlette", "uvicorn", "ray"),
    "train": (*_EXPORT, "peft"),
    "tensorrt": ("tensorrt", "cuda-bindings", "tokenizers", "minijinja"),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-bindings", "tokenizers", "minijinja"),
}
_SAME_MODULE = {"onnxruntime": "onnxruntime-gpu"}
# The oldest versions that the runtime works with, as in pyproject.toml.
OLDEST = {"numpy": (2, 0), "onnxruntime": (1, 30)}


def version(distribution: str) -> str | None:
    """Installed version of a distribution, or None. Imports nothing of it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old(distribution: str) -> bool:
    """Tell whether an installed distribution is older than ``OLDEST`` allows."""
    installed = version(distribution)
    if installed is None:
        return False
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    return numbers < OLDEST[distribution]


def missing(extra: str) -> list[str]:
    """Distributions of ``extra`` that aren't installed. One of those that bring the same module is enough."""
    return [name for name in EXTRAS[extra] if version(name) is None and version(_SAME_MODULE.get(name, name)) is None]


def install_command(extra: str) -> str:
    """Shell command that installs ``extra``."""
    return f"pip install 'medusa-deploy[{extra}]'"


def require(extra: str) -> None:
    """Ask for an extra before the first of its imports.

    Raises:
        MissingDependencyError: one of its distributions isn't installed.
    """
    absent = missing(extra)
    if absent:
        from ..runtime.errors import MissingDependencyError

        what = f"this needs {', '.join(absent)}, not installed here"
        raise MissingDependencyError(what, hint=f"install with: {install_command(extra)}")


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice off stderr: a verb shows its own. Call it before they are imported."""
    from ..export.hub import OWN_SILENCE

    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & set(os.environ):
        quiet |= {"HF_HUB_OFFLINE": "1", OWN_SILENCE: "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
