"""Keeps how far texts have come through a model's layers, so that an interrupted run goes on behind the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import CalibrationError
from ...runtime.files.scales_file import GRIDS, Smoothing
from .observations import Observations


@dataclass(slots=True)
class LayerProgress:
    """Holds the number of ``stages`` done and their results ``seen`` and ``smoothing`` (by activation and grid).

    ``states`` [1, N, H]: handed on by the last of them, one a text; None if it handed on none.
    """

    seen: Observations
    states: list[np.ndarray | None]
    smoothing: dict[str, Mapping[str, Smoothing]] = field(default_factory=dict)
    stages: int = 0

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write everything to ``path``, whole or not at all. ``settings`` must be the same in the run that goes on.

        Raises:
            OutputError: the file system refused; an older file is still there.
        """
        found = [entry for grids in self.smoothing.values() for entry in (grids[grid] for grid in GRIDS)]
        facts = {name: [_facts(grids[grid]) for grid in GRIDS] for name, grids in self.smoothing.items()}
        states = [state[0] for state in self.states if state is not None]
        more = {
            "stages": np.array(self.stages),
            "states": np.concatenate(states) if states else np.zeros((0, 0), np.float32),
            "smoothing": np.array(json.dumps(facts)),
            "factors": np.concatenate([entry.factors for entry in found]) if found else np.zeros(0, np.float32),
        }
        self.seen.save(path, settings, more)

    def resume(self, path: Path, settings: Mapping[str, Any], lengths: Sequence[int]) -> None:
        """Load ``path``, if there is such a file. ``lengths``: of the texts.

        Raises:
            CalibrationError: the file is damaged, or of a run with other settings.
        """
        more = self.seen.resume(path, settings, ("stages", "states", "smoothing", "factors"))
        if not more:
            return
        try:
            self.stages = int(more["stages"])
            if len(more["states"]):
                ends = [0, *np.cumsum(lengths).tolist()]
                self.states = [more["states"][None, start:end] for start, end in pairwise(ends)]
                if ends[-1] != len(more["states"]):
                    raise ValueError(f"{len(more['states'])} rows for {ends[-1]} tokens")
            start = 0
            for name, entries in json.loads(str(more["smoothing"])).items():
                channels = len(self.seen.observers[name].channel_maxima)
                grids = {}
                for grid, (alpha, error, unsmoothed_error) in zip(GRIDS, entries, strict=True):
                    grids[grid] = Smoothing(alpha, error, unsmoothed_error, more["factors"][start : start + channels])
                    start += channels
                self.smoothing[name] = grids
            if start != len(more["factors"]):
                raise ValueError(f"{len(more['factors'])} factors, expected {start}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f"{path} can't be read: {error!r:.120}", hint=f"remove {path}: calibration then starts anew"
            ) from None


def _facts(entry: Smoothing) -> list[float | None]:
    return [entry.alpha, entry.error, entry.unsmoothed_error]
