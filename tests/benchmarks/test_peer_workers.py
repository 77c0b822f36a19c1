"""benchmarks/peer: the worker protocol. No peer needs to be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from peer.process import PeerError, Worker

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FAKE = """
import os, sys
sys.path.insert(0, {benchmarks!r})
from peer import serve
from peer.base import Answer, Peer
from peer.systems import SYSTEMS, System

class Fake(Peer):
    module, roots = {module!r}, ("pytest",)

    def load(self, settings):
        if settings.path == "absent":
            raise FileNotFoundError("no such model")
        self.settings = settings

    def run(self, token_ids, max_new_tokens):
        print("a library that talks on stdout")
        os.write(1, b"and below Python\\n")
        if token_ids == [13]:
            print("bad luck", file=sys.stderr, flush=True)
            os._exit(7)
        return Answer([sum(token_ids)] * max_new_tokens, 0.0, 2)

    def run_many(self, prompts, max_new_tokens):
        if self.settings.slots == 1:
            return super().run_many(prompts, max_new_tokens)
        return [[sum(prompt)] * max_new_tokens for prompt in prompts]

SYSTEMS["fake"] = System("fake", Fake(), "model", "")
serve.main(["fake"])
"""


def fake_worker(folder: Path, module: str = "json") -> Worker:
    script = folder / f"fake_{module}.py"
    script.write_text(FAKE.format(benchmarks=str(BENCHMARKS), module=module))
    return Worker([sys.executable, str(script)], folder / "logs" / "fake.log", threads=1)


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    running = fake_worker(tmp_path)
    yield running
    running.stop()


def load(worker: Worker, path: str = "model", **more: Any) -> dict[str, Any]:
    return worker.ask("load", path=path, threads=1, capacity=64, eos_token_ids=[2], **more)


def test_a_worker_greets_loads_runs_and_quits(worker: Worker) -> None:
    assert worker.greeting["installed"]
    assert worker.greeting["versions"] == {"pytest": pytest.__version__}
    assert worker.greeting["install_bytes"]["pytest"] > 100_000
    assert load(worker)["seconds"] >= 0
    answer = worker.ask("run", token_ids=[3, 4], max_new_tokens=5)
    assert answer["token_ids"] == [7] * 5
    assert answer["steps"] == 2
    assert answer["seconds"] > 0
    assert worker.ask("quit")["peak_rss_bytes"] > 1_000_000
    assert worker.process.wait(10) == 0


def test_a_worker_answers_several_prompts(worker: Worker) -> None:
    load(worker, slots=2)
    answer = worker.ask("run_many", prompts=[[1, 2], [3], [4]], max_new_tokens=2)
    assert answer["answers"] == [[3, 3], [3, 3], [4, 4]]
    assert answer["seconds"] > 0


def test_a_system_that_answers_one_at_a_time_says_so(worker: Worker) -> None:
    load(worker)
    with pytest.raises(PeerError, match="answers one prompt at a time here"):
        worker.ask("run_many", prompts=[[1]], max_new_tokens=2)


def test_what_a_library_prints_goes_to_the_log(worker: Worker) -> None:
    load(worker)
    worker.ask("run", token_ids=[1], max_new_tokens=1)
    worker.ask("quit")
    worker.process.wait(10)
    assert "below Python" in worker.log.read_text()


def test_an_error_is_one_line_and_the_worker_lives_on(worker: Worker) -> None:
    with pytest.raises(PeerError, match="^FileNotFoundError: no such model$"):
        load(worker, "absent")
    assert load(worker)["seconds"] >= 0


def test_a_death_is_reported_with_status_and_last_words(worker: Worker) -> None:
    load(worker)
    with pytest.raises(PeerError, match="status 7: bad luck"):
        worker.ask("run", token_ids=[13], max_new_tokens=1)
    with pytest.raises(PeerError, match="status 7"):
        worker.ask("run", token_ids=[1], max_new_tokens=1)


def test_a_killed_worker_is_said_to_be_killed(worker: Worker) -> None:
    worker.process.kill()
    worker.process.wait(10)
    with pytest.raises(PeerError, match="was killed by signal 9"):
        load(worker)


def test_a_missing_package_is_said_in_the_greeting(tmp_path: Path) -> None:
    worker = fake_worker(tmp_path, module="no_such_package_anywhere")
    assert worker.greeting == {"installed": False}
    worker.stop()
