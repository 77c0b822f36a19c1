"""Every verb that runs a bundle says which engine does it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from medusa_deploy.runtime.session import Session
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.measure.bench import ways_of
from medusa_deploy.tools.measure.hit_table import count_hits
from medusa_deploy.tools.prompt_source import random_prompts
from support.fake_cuda import FakeRuntime
from support.fake_trt import FakeTrt

VERBS = {
    "generate": ["--token-ids", "5,6,7", "-n", "12"],
    "verify": ["--count", "2", "--max-new-tokens", "8", "--trees", "chain,best-rows"],
    "bench": ["--count", "2", "--max-new-tokens", "8", "--repeats", "1"],
}


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with an engine."""
    from support.fake_engine import add_fake_engine

    return add_fake_engine(Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engine") / "bundle")), rows=(1, 4, 16))


@pytest.mark.parametrize("verb", VERBS)
def test_it_runs_on_the_engine_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    from support.fake_engine import fake_gpu

    module = FakeTrt(FakeRuntime())
    fake_gpu(monkeypatch, module)
    options = [*VERBS[verb], "--json", "-"]
    assert main([verb, str(folder), "--backend", "tensorrt", "--target", "sm_89", *options]) == 0
    on_gpu = json.loads(capsys.readouterr().out)
    assert module.enqueued, "the engine has run"
    assert main([verb, str(folder), *options]) == 0
    on_cpu = json.loads(capsys.readouterr().out)
    if verb == "generate":
        assert on_gpu["token_ids"] == on_cpu["token_ids"]
    else:
        assert (on_gpu["environment"]["backend"], on_cpu["environment"]["backend"]) == ("tensorrt", "cpu")
    if verb == "bench":
        assert set(on_gpu) - set(on_cpu) == {"best_rows"} and on_gpu["equal"]["different"] == []


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_said_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main([verb, str(folder), "--backend", "tensorrt", *VERBS[verb]]) == 1
    said = capsys.readouterr().err
    assert "tensorrt can't be imported" in said and "pip install 'medusa-deploy[tensorrt]'" in said
    assert main([verb, str(folder), "--target", "sm_89", *VERBS[verb]]) == 1
    assert "the backend cpu takes no target" in capsys.readouterr().err
    assert main([verb, str(folder), "--backend", "abacus", *VERBS[verb]]) == 1
    assert "unknown backend 'abacus'" in capsys.readouterr().err


def test_where_steps_run_ahead_the_bundles_tree_is_what_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.fake_engine import load_fake

    session = load_fake(folder, monkeypatch, FakeTrt(FakeRuntime()))
    assert ways_of(session, None)["medusa"].tree == session.tree
    assert ways_of(session, 3)["medusa"].tree is None


def test_a_sweep_measures_every_size_on_the_profile_that_holds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_deploy.tools.measure.row_sweep import row_sweep
    from support.fake_engine import load_fake

    module = FakeTrt(FakeRuntime())
    session = load_fake(folder, monkeypatch, module)
    assert len(row_sweep(session, rounds=1)["ms_by_rows"]) > 4
    assert {shapes["tokens"] for shapes in module.enqueued} >= {(1, 1), (1, 4), (1, 16)}
    assert session.slots.free == 1


def test_an_engine_counts_the_hits_that_the_cpu_counts(
    folder: Path, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position is a root there too, although its steps may run ahead of the host."""
    from support.fake_engine import load_fake

    session, prompts = load_fake(folder, monkeypatch, FakeTrt(FakeRuntime())), random_prompts(128, 256, 2, seed=3)
    on_gpu, on_cpu = (count_hits(each, prompts, 24) for each in (session, tiny_session))
    assert on_gpu.ranks is not None and on_cpu.ranks is not None
    assert on_gpu.ranks.tolist() == on_cpu.ranks.tolist()
