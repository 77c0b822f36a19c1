"""SIGTERM: ready goes off at once, streams end properly, and the process exits with 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from support.documents import ROOT

_PROGRAM = """
import logging, sys, time
from pathlib import Path
from medusa_deploy.runtime.serve.limits import JsonLines
from medusa_deploy.runtime.serve.server import serve
from medusa_deploy.runtime.serve.service import Options
from support.fake_executor import fake_session

handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(JsonLines())
logging.getLogger("medusa_deploy.serve").addHandler(handler)
logging.getLogger("medusa_deploy.serve").setLevel("INFO")

def load():
    session = fake_session(2, text_folder=Path(sys.argv[1]))
    run = session.executor.run
    session.executor.run = lambda plan: (time.sleep(0.02), run(plan))[1]
    return session

serve(load, Options(drain_seconds=float(sys.argv[2])), port=0)
"""


class Process:
    """A server in a process of its own; its log lines are read as they come."""

    def __init__(self, folder: Path, drain: float) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
        command = [sys.executable, "-c", _PROGRAM, str(folder), str(drain)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
        self.url = self.line("listening")["url"]
        self.line("ready")

    def line(self, event: str) -> dict[str, Any]:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            if (found := json.loads(text))["event"] == event:
                return dict(found)
        raise AssertionError(f"no {event}")


def test_answers_that_a_stop_cuts_off_before_their_first_token_are_503(tmp_path: Path) -> None:
    server = Process(tmp_path, 0.3)
    body = {"prompt": "ab", "max_tokens": 200, "ignore_eos": True}
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(5)]
            while "medusa_num_requests_waiting 3.0" not in client.get("/metrics").text:
                pass
            server.process.send_signal(signal.SIGTERM)
            found = [each.result() for each in asked]
        assert sorted(each.status_code for each in found) == [200, 200, 503, 503, 503]
        assert {each.json()["error"]["code"] for each in found if each.status_code == 503} == {"service_unavailable"}
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()


@pytest.mark.parametrize("drain", [30, 0.3])
def test_11_sigterm_ends_streams_properly(tmp_path: Path, drain: float) -> None:
    server = Process(tmp_path, drain)
    body = {"prompt": "ab", "max_tokens": 100, "stream": True, "ignore_eos": True, "temperature": 0}
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client, httpx.Client(base_url=server.url) as other:
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                server.line("stopping")
                if drain > 1:
                    assert other.get("/health/ready").status_code == 503 and other.get("/health").status_code == 200
                    assert other.post("/v1/completions", json=body).status_code == 503
                rest = [line[6:] for line in lines if line]
            assert rest[-1] == "[DONE]"
            reason = json.loads(rest[-2])["choices"][0]["finish_reason"]
            assert reason == ("length" if drain > 1 else "cancelled")
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
