"""Keeps a training run on disk, whole or not at all, so that it can go on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...runtime.errors import TrainingError
from ...runtime.files.bundle import write_whole

_AGAIN = "remove it, or train with the same settings"


def save_checkpoint(path: Path, settings: Mapping[str, Any], done: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Write the state of ``parts`` (anything with ``state_dict``) and the run's progress ``done``.

    Raises:
        OutputError: the file system refused; an older checkpoint is still there.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    saved = {"settings": dict(settings), "done": dict(done), "states": states}
    write_whole(path, lambda file: torch.save(saved, file))


def resume_checkpoint(path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Load ``parts`` from ``path`` and return the run's progress; empty if there is no such file.

    Raises:
        TrainingError: the file is damaged, or belongs to a run with other settings.
    """
    if not path.exists():
        return {}
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:  # unpickling a damaged file may raise anything
        raise TrainingError(f"{path} can't be read: {type(error).__name__}", hint="remove it: training starts anew") from error
    found = saved.get("settings") if isinstance(saved, dict) else None
    if not isinstance(found, dict) or found != dict(settings):
        names = sorted(settings) if not isinstance(found, dict) else _different(found, settings)
        raise TrainingError(f"{path} belongs to a run with other settings: {', '.join(names)}", hint=_AGAIN)
    for name, part in parts.items():
        part.load_state_dict(saved["states"][name])
    return dict(saved["done"])


def _different(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    names = sorted(found.keys() | settings.keys())
    pairs = {name: (found.get(name), settings.get(name)) for name in names}
    return [f"{name} {there!r} there, {here!r} here" for name, (there, here) in pairs.items() if there != here]
