"""Keeps what a calibration run has seen so far, in memory and on disk, so that an interrupted run goes on from it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...runtime.errors import CalibrationError
from ...runtime.files.bundle import write_whole
from .matmuls import Matmul
from .observers import BINS, RangeObserver


@dataclass(slots=True)
class Observations:
    """Holds ``observers`` by activation, the number of ``prompts`` done, and the rows of their prefills and steps."""

    observers: Mapping[str, RangeObserver]
    prompts: int = 0
    prefill_rows: int = 0
    tree_rows: int = 0

    @classmethod
    def of(cls, matmuls: Iterable[Matmul]) -> Self:
        """Start with nothing seen of the activations of these matmuls."""
        return cls({matmul.activation: RangeObserver(matmul.activation, matmul.channels) for matmul in matmuls})

    def take(self, values: Iterable[tuple[str, np.ndarray]], positions: np.ndarray, *, prefill: bool) -> None:
        """Take in the activations of one call, by name."""
        for name, value in values:
            self.observers[name].observe(value)
        if prefill:
            self.prefill_rows += len(positions)
        else:
            self.tree_rows += len(positions)

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        for name, observer in self.observers.items():
            observer.merge(other.observers[name])
        self.prompts += other.prompts
        self.prefill_rows += other.prefill_rows
        self.tree_rows += other.tree_rows

    def save(self, path: Path, settings: Mapping[str, Any], more: Mapping[str, np.ndarray] | None = None) -> None:
        """Write everything to ``path``, whole or not at all. ``settings`` must be the same in the run that goes on.

        ``more``: arrays that belong to the same state.

        Raises:
            OutputError: the file system refused; an older file is still there.
        """
        observers = list(self.observers.values())
        arrays: dict[str, Any] = {
            "settings": np.array(json.dumps(settings, sort_keys=True)),
            "done": np.array([self.prompts, self.prefill_rows, self.tree_rows]),
            "counts": np.stack([observer.counts for observer in observers]),
            "exponents": np.array([observer.exponent for observer in observers]),
            "rows": np.array([observer.rows for observer in observers]),
            "maxima": np.concatenate([observer.channel_maxima for observer in observers]),
            **(more or {}),
        }
        write_whole(path, lambda file: np.savez(file, **arrays))

    def resume(self, path: Path, settings: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Load ``path``, if there is such a file, and return the arrays ``more``.

        Raises:
            CalibrationError: the file is damaged, or of a run with other settings.
        """
        if not path.exists():
            return {}
        again = f"remove {path}: calibration then starts anew"
        try:
            with np.load(path) as saved:
                found = json.loads(str(saved["settings"]))
                arrays = {name: saved[name] for name in ("done", "counts", "exponents", "rows", "maxima", *more)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RecursionError) as error:
            raise CalibrationError(f"{path} can't be read: {error!r:.120}", hint=again) from None
        if found != dict(settings):
            names = sorted(name for name in {*settings, *found} if found.get(name) != settings.get(name))
            raise CalibrationError(f"{path} belongs to a run with other settings: {', '.join(names)}", hint=again)
        self._take(path, arrays, again)
        return {name: arrays[name] for name in more}

    def _take(self, path: Path, arrays: Mapping[str, np.ndarray], again: str) -> None:
        observers = list(self.observers.values())
        channels = [len(observer.channel_maxima) for observer in observers]
        shapes = {"done": (3,), "counts": (len(observers), BINS), "maxima": (sum(channels),)}
        shapes |= {name: (len(observers),) for name in ("exponents", "rows")}
        if any(arrays[name].shape != shape for name, shape in shapes.items()):
            raise CalibrationError(f"{path} holds other activations than the bundle", hint=again)
        maxima = np.split(arrays["maxima"], np.cumsum(channels)[:-1])
        for index, observer in enumerate(observers):
            observer.counts = arrays["counts"][index].copy()
            observer.exponent, observer.rows = int(arrays["exponents"][index]), int(arrays["rows"][index])
            observer.channel_maxima = maxima[index].copy()
        self.prompts, self.prefill_rows, self.tree_rows = map(int, arrays["done"])
