"""The page's own script against a real server: runs are marked, rates shown, errors said, and stopping cancels."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from support.documents import ROOT
from support.fake_executor import fake_session
from support.server import drafting, serving
from support.text import decode, encode


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_shows_runs_rates_and_errors_and_stops(tmp_path: Path) -> None:
    session = drafting(fake_session(1, text_folder=tmp_path))
    run = session.executor.run
    session.executor.run = lambda plan: (time.sleep(0.005), run(plan))[1]  # type: ignore[method-assign]
    page = ROOT / "runtime" / "serve" / "page.html"
    with serving(session) as server:
        command = ["node", str(ROOT / "tests" / "support" / "page_shim.js"), str(page), server.url]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 0, found.stderr
        end = time.monotonic() + 20
        while session.slots.free == 0:
            assert time.monotonic() < end, "the stopped request goes on"
    shown = json.loads(found.stdout)
    assert shown["model"] == "tiny" and shown["state"].startswith("acceptance ") and shown["facts"].startswith("40 tokens · ")
    assert "".join(text for text, _, _ in shown["runs"]) == decode(session.language.greedy(encode("user:hello;>"), 40))
    assert {name for _, kept, name in shown["runs"] if kept} == {"run more"} and max(kept for _, kept, _ in shown["runs"]) > 1
    assert shown["error"][0] == "said error" and "max_tokens" not in shown["error"][1] and "256" in shown["error"][1]
    assert shown["stopped"] == "said assistant"
