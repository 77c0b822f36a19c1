"""A table of learned positions limits the capacity; drafts beyond it don't fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import UnsupportedArchitectureError

POSITIONS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    folder = tmp_path_factory.mktemp("positions") / "model"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_larger_capacity_is_refused(model: Path, tmp_path: Path) -> None:
    from medusa_deploy.export.exporter import export_bundle

    with pytest.raises(UnsupportedArchitectureError, match="learned 24 positions, the capacity is 25"):
        export_bundle(model, None, tmp_path / "bundle", capacity=POSITIONS + 1)


def test_the_last_position_is_reached_with_drafts_beyond_it(model: Path, tmp_path: Path) -> None:
    from medusa_deploy.export.exporter import export_bundle

    export_bundle(model, None, tmp_path / "bundle", capacity=POSITIONS)
    for variant in ("cpu", "standard"):
        session = load(tmp_path / "bundle", variant=variant, threads=1)
        options = {"token_ids": [1, 2, 3] * 4, "max_new_tokens": POSITIONS - 12, "ignore_eos": True}
        assert session.generate(**options, rows=8).token_ids == session.generate(**options, speculative=False).token_ids
