"""The client ``llm`` works unmodified, with the one file that its documentation asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llm")

from support.fake_executor import fake_session
from support.server import serving
from support.text import decode, encode


@pytest.mark.parametrize("stream", [True, False])
def test_llm_prompts_the_server(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "home").mkdir()
    session = fake_session(1, text_folder=tmp_path)
    with serving(session) as server:
        model = f"- model_id: here\n  model_name: tiny\n  api_base: {server.url}/v1\n"
        (tmp_path / "home" / "extra-openai-models.yaml").write_text(model, "utf-8")
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "llm", "-m", "here", "hello", "-o", "temperature", "0", "-o", "max_tokens", "20"]
        command += [] if stream else ["--no-stream"]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip("\n") == decode(session.language.greedy(encode("user:hello;>"), 20)).rstrip("\n")
