"""What an application pays for importing the runtime: numpy, and nothing that a bundle may never need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = (
    "torch onnx onnx_ir onnxscript transformers tensorrt tensorrt_rtx onnxruntime tokenizers minijinja safetensors "
    "starlette uvicorn msgspec hypothesis pytest"
)
ON_USE = "_hashlib bz2 fcntl glob hashlib json lzma medusa_deploy.runtime.files pathlib random secrets shutil tempfile"
_IMPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*[name for name in sys.argv[2].split() if name in sys.modules])
"""


def _loaded_by(module: str, candidates: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _IMPORT, module, candidates]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "module", ["medusa_deploy", "medusa_deploy.runtime", "medusa_deploy.tools.cli", "medusa_deploy.calibration.int8.scales"]
)
def test_an_import_is_light(module: str) -> None:
    assert _loaded_by(module, HEAVY) == []


def test_modules_that_few_calls_need_are_imported_by_those_calls() -> None:
    """They took a quarter of the time of this import. Decoding needs none of them until it samples."""
    assert set(_loaded_by("medusa_deploy.runtime", ON_USE)) <= set(_loaded_by("numpy", ON_USE))


def test_the_command_line_does_not_import_numpy_either() -> None:
    assert _loaded_by("medusa_deploy.tools.cli", "numpy") == []


def test_the_probe_sees_what_is_imported() -> None:
    assert _loaded_by("medusa_deploy.runtime", "numpy threading torch") == ["numpy", "threading"]
