"""The verb: a real bundle in a process of its own, its options, and what it refuses before it listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")

from medusa_deploy.tools.cli import USAGE, USER_ERROR, main  # noqa: E402
from support.documents import ROOT  # noqa: E402
from support.text import text_bundle  # noqa: E402


@contextmanager
def running(*words: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run the verb. Yields its address once it is ready, and its log lines, all of them at the end. It must exit with 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    command = [sys.executable, "-m", "medusa_deploy", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    try:
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "ready":
                break
        yield next(line["url"] for line in lines if line["event"] == "listening"), lines
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
        lines += [json.loads(line) for line in rest.splitlines()]
        assert (process.returncode, out) == (0, "")
    finally:
        process.kill()


def test_a_bundle_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    from medusa_deploy.runtime import load

    bundle = text_bundle(tiny_bundle, tmp_path / "talking")
    (tmp_path / "keys").write_text("a-key\n", "utf-8")
    wanted = load(bundle, threads=1).generate("xyz", max_new_tokens=20)
    options = ["--threads", "1", "--api-keys", str(tmp_path / "keys"), "--acceptance-metrics"]
    with running(str(bundle), *options) as (url, lines):
        body = {"model": "talking", "prompt": "xyz", "max_tokens": 20, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        found = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer a-key"}, timeout=60).json()
        assert found["choices"][0]["text"] == wanted.text and found["usage"]["completion_tokens"] == len(wanted.token_ids)
        assert found["metrics"]["speculative_decoding"].keys() >= {"mean_acceptance_length", "acceptance_histogram"}
    assert lines[-1]["event"] == "stopping" and [line["slots"] for line in lines if line["event"] == "ready"] == [4]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [401, 200] and requests[1]["completion_tokens"] == len(wanted.token_ids)
    assert "xyz" not in json.dumps(requests)


@pytest.mark.model
def test_the_real_model_is_served(tmp_path: Path) -> None:
    bundle = ROOT / "build" / "smollm2-bundle"
    if not bundle.is_dir():
        pytest.skip("make demo makes it")
    from medusa_deploy.runtime import load

    openai = pytest.importorskip("openai")
    question: Any = [{"role": "user", "content": "Why is the sky blue? Answer with an emoji, too."}]
    wanted = load(bundle, check_hashes=False).generate(messages=question, max_new_tokens=48)
    with running(str(bundle), "--slots", "2", "--no-hashes") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask: Any = {"model": "smollm2-bundle", "messages": question, "max_tokens": 48, "temperature": 0}
        assert client.chat.completions.create(**ask).choices[0].message.content == wanted.text
        events = list(client.chat.completions.create(**ask, stream=True, logprobs=True, top_logprobs=2))
        assert "".join(event.choices[0].delta.content or "" for event in events) == wanted.text
        entries = [entry for event in events for entry in (event.choices[0].logprobs.content or [])]
        spelt = b"".join(bytes(entry.bytes) for entry in entries).decode()
        assert spelt.removesuffix("<|im_end|>") == wanted.text
        assert all(entry.logprob <= 0 and entry.top_logprobs[0].logprob >= entry.logprob for entry in entries)


def test_what_cannot_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == USER_ERROR
    assert "error:" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--api-keys", str(tmp_path / "keys")]) == USER_ERROR
    assert "API keys" in capsys.readouterr().err
    for words in (["--port", "70000"], ["--port", "x"], ["--drain", "0"], ["--slots", "0"], ["--deadline", "nan"]):
        assert main(["serve", str(tmp_path), *words]) == USAGE
    capsys.readouterr()
