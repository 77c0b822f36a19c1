"""Makes, once, the bundle that the demo and the slow tests run: SmolLM2-135M-Instruct with the repository's heads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL, BUNDLE, STAMP = "smollm2", "smollm2-bundle", "smollm2-bundle.json"
SCALES = "smollm2-scales.json"
INT8 = "cpu-int8"
HEADS = Path("heads", "smollm2-135m-instruct", "grounded")
BATCH = 8
_SCALES_PROMPTS, _SCALES_TOKENS = 16, 32


def ensure_bundle(build: Path, heads: Path, report: Callable[[str], None] = lambda _phase: None) -> Path:
    """Find the bundle of SmolLM2 and ``heads`` below ``build``, or export it now if it isn't up to date.

    It is up to date when this version and source of export made it from these heads. The converted model is kept beside it.

    Raises:
        HeadsError: no such heads.
        DownloadError, CheckpointError, OutputError: the model can't be fetched, read or written.
    """
    from ...runtime.errors import HeadsError
    from ..console import write_json

    if not heads.is_dir():
        raise HeadsError(f"no heads at {heads}", hint="run the demo in a clone of the repository, or give --heads FOLDER")
    model, bundle, stamp = build / MODEL, build / BUNDLE, build / STAMP
    recipe = _recipe(heads)
    if _made_by(bundle, stamp) == recipe:
        return bundle
    from ...export.exporter import export_bundle
    from .smollm2 import prepare_smollm2

    if not (model / "config.json").is_file():
        prepare_smollm2(model, report=report)
    stamp.unlink(missing_ok=True)
    export_bundle(model, heads, bundle, batch=BATCH, force=True, report=report)
    write_json({"recipe": recipe, "manifest": _manifest_digest(bundle)}, stamp)
    return bundle


def ensure_int8(build: Path, bundle: Path) -> None:
    """Add the variant of 8-bit weights to the bundle if it has none, with scales that are measured now.

    Raises:
        CalibrationError, QuantisationError, OutputError: see :func:`.scales.calibrate` and :func:`.variant.quantise`.
    """
    from ...runtime.files.bundle import open_bundle
    from ..console import write_json
    from .scales import calibrate
    from .variant import quantise

    if INT8 in open_bundle(bundle, check_hashes=False).manifest.variants:
        return
    recipe = _made_by(bundle, build / STAMP)
    calibrate(bundle, build / SCALES, samples=_SCALES_PROMPTS, max_new_tokens=_SCALES_TOKENS, force=True)
    quantise(bundle, build / SCALES, name=INT8)
    if recipe is not None:  # the exported bundle is still there, with a variant more
        write_json({"recipe": recipe, "manifest": _manifest_digest(bundle)}, build / STAMP)


def _made_by(bundle: Path, stamp: Path) -> str | None:
    """Recipe of the bundle that is there, if the stamp beside it is about that very bundle; else None."""
    try:
        made: Any = json.loads(stamp.read_bytes())
        return str(made["recipe"]) if made["manifest"] == _manifest_digest(bundle) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _recipe(heads: Path) -> str:
    """Digest of all that decides the bundle's contents: heads, version, sources of export and of the formats it writes."""
    from ... import __version__, export, runtime

    digest = hashlib.sha256(f"{__version__} {BATCH}".encode())
    export_folder, runtime_folder = (Path(str(package.__file__)).parent for package in (export, runtime))
    formats = [runtime_folder / "files" / "manifest.py", runtime_folder / "executors" / "step_io.py"]
    sources = [*sorted(export_folder.rglob("*.py")), *formats]
    for path in [*sorted(path for path in heads.iterdir() if path.is_file()), *sources]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _manifest_digest(bundle: Path) -> str:
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
