"""The real model: SmolLM2-135M-Instruct with the committed heads, kept under build/ between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime import Session, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2_bundle() -> Path:
    """The bundle that ``make demo`` makes, made now if it isn't there."""
    pytest.importorskip("transformers")
    from medusa_deploy.tools.making.demo_bundle import HEADS, ensure_bundle

    return ensure_bundle(ROOT / "build", ROOT / HEADS)


@pytest.fixture(scope="session")
def smollm2(smollm2_bundle: Path) -> Session:
    """One slot: the CPU variant."""
    return load(smollm2_bundle)
