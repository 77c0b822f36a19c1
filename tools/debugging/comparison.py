"""Compares what polygraphy saved with what a kit expects, and says which tensor leaves first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .kit import EXPECTED, KIT_NAME, KIT_VERSION, SAVED
from .results_file import read_results

TOLERANCE = 0.05
"""Largest relative error ‖found − expected‖ / ‖expected‖ of a tensor that counts as rounding of fp16."""
_HINT = "write it again with: medusa-deploy debug BUNDLE --target SM -o KIT"


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor's relative error. ``nan``: NaN or infinity was found where a finite number was expected."""

    tensor: str
    node: str
    place: str
    error: float
    largest: float
    nan: bool

    def leaves(self, tolerance: float) -> bool:
        """True if rounding doesn't explain it."""
        return self.nan or self.error > tolerance


def read_kit(folder: Path) -> dict[str, Any]:
    """Read ``kit.json``.

    Raises:
        UsageError: the folder is no kit of this or an older version.
    """
    from ...runtime.errors import UsageError
    from ...runtime.files.json_file import read_json_file

    raw = read_json_file(folder / KIT_NAME, limit=16 << 20, error=UsageError, hint=_HINT)
    if not isinstance(raw, dict) or not isinstance(raw.get("kit_version"), int) or not isinstance(raw.get("marked"), list):
        raise UsageError(f"{folder} is no kit", hint=_HINT)
    if raw["kit_version"] > KIT_VERSION:
        raise UsageError(
            f"{folder} has version {raw['kit_version']}; this program reads up to {KIT_VERSION}", hint="upgrade medusa-deploy"
        )
    return raw


def compare_kit(folder: Path, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Compare all steps that polygraphy saved. Returns, by step and runner, the first tensor that leaves and the worst ones.

    Raises:
        UsageError: no kit, nothing saved, or a file that isn't polygraphy's.
    """
    from ...runtime.errors import UsageError
    from ..extras import require

    require("debug")
    kit = read_kit(folder)
    steps = {}
    for step in kit["steps"]:
        saved = folder / SAVED / f"{step}.json"
        if not saved.exists():
            continue
        [expected] = read_results(folder / EXPECTED / f"{step}.json").values()
        runs = {}
        for runner, found in read_results(saved).items():
            differences = _differences(kit["marked"], expected, found)
            leaving = [each for each in differences if each.leaves(tolerance)]
            worst = sorted(differences, key=lambda each: -each.error)[:5]
            runs[runner] = {
                "compared": len(differences),
                "leaving": len(leaving),
                "first": asdict(leaving[0]) if leaving else None,
                "worst": [asdict(each) for each in worst],
            }
        steps[step] = runs
    if not steps:
        raise UsageError(
            f"{folder / SAVED} holds no outputs", hint="run commands.sh in the kit on the machine with the GPU"
        )
    return {"kit": str(folder), "tolerance": tolerance, "layers": kit["layers"], "steps": steps}


def _differences(
    marked: list[dict[str, str]], expected: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> list[Difference]:
    """Compare the tensors that both have, in the order in which the graph computes them."""
    differences = []
    for entry in marked:
        name = entry["tensor"]
        if name not in expected or name not in found:
            continue
        wanted, got = (values[name].astype(np.float64) for values in (expected, found))
        if wanted.shape != got.shape:
            differences.append(Difference(name, entry["node"], entry["place"], np.inf, np.inf, nan=False))
            continue
        finite = np.isfinite(wanted)
        nan = bool((~np.isfinite(got[finite])).any())
        off = np.where(np.isfinite(got[finite]), got[finite] - wanted[finite], 0.0)
        size = float(np.linalg.norm(wanted[finite]))
        error = float(np.linalg.norm(off)) / size if size else float(np.linalg.norm(off) > 0)
        differences.append(Difference(name, entry["node"], entry["place"], error, float(np.abs(off).max(initial=0)), nan=nan))
    return differences
