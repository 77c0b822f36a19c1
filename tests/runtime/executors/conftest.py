"""A session of one slot to compare with, and the calls of graphs that sessions make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.session import Session


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of places of each call of a graph; 1 for the graph of one slot."""
    onnxruntime = pytest.importorskip("onnxruntime")
    seen: list[int] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def noted(self: Any, *arguments: object) -> None:
        places = [value.shape[0] for value in self.get_inputs() if value.name == step_io.ROWS_OF_SLOT]
        seen.append(places[0] if places else 1)
        run(self, *arguments)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noted)
    return seen
