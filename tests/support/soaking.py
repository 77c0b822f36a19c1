"""Amounts and figures: the same tests run in small with all others, and in full by ``make soak``, which keeps a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.text import text_bundle

FULL = os.environ.get("MEDUSA_DEPLOY_SOAK") == "full"
REPORT = os.environ.get("MEDUSA_DEPLOY_SOAK_REPORT")


@pytest.fixture(scope="session")
def amount() -> Callable[[int, int], int]:
    """Chooses between an amount in small and one in full."""
    return lambda small, full: full if FULL else small


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """What was found, by subject; written to the report, beside what other runs left there."""
    found: dict[str, Any] = {}
    yield found
    if REPORT and found:
        path = Path(REPORT)
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        for subject, figures_of_it in found.items():
            before[subject] = before.get(subject, {}) | figures_of_it
        path.write_text(json.dumps(before, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


@pytest.fixture(scope="session")
def speaking_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_bundle`` with a tokenizer and a chat template."""
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("speaking") / "bundle")
