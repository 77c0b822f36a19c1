"""Clients that want more than an answer: others' prompts, files, log lines, and other people's time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime.serve.limits import JsonLines, read_keys
from support.fake_executor import fake_session
from support.raw_http import ask as ask_raw
from support.server import Running, serving

SECRET = "the launch code is 0451 and nobody else may know it"


def test_no_key_learns_what_another_key_asked(tmp_path: Path) -> None:
    """A thief tries every beginning of the victim's prompt, under every salt that might be the victim's."""
    (tmp_path / "keys").write_text("victim-key\nthief-key\n", "utf-8")
    digest = hashlib.sha256(b"victim-key").hexdigest()
    session = fake_session(2, text_folder=tmp_path)
    with serving(session, keys=read_keys(tmp_path / "keys")) as server:

        def ask(key: str, prompt: str, **body: Any) -> tuple[int, int]:
            """Return the tokens that came from the cache, and those that the engine read."""
            rows = sum(plan_rows(session))
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **body}
            usage = server.http.post("/v1/completions", json=body, headers=headers).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"], sum(plan_rows(session)) - rows

        ask("victim-key", SECRET)
        ask("victim-key", SECRET, cache_salt="mine")
        for salt in ("", ":", digest, f"{digest}:", f"{digest}:mine", "mine", ":mine", f"\n{digest}:mine", "victim-key"):
            for end in (1, 20, 21, len(SECRET) - 1, len(SECRET)):
                cached, read = ask("thief-key", SECRET[:end] + "#", cache_salt=salt)
                own = max((other for other in (1, 20, 21, len(SECRET) - 1) if other < end), default=0)
                assert cached <= own, "it knows more than the thief asked before"
                assert read >= end + 1 - own
        assert ask("victim-key", SECRET)[0] == 0, "the thief's prompts took its slots"
        assert ask("victim-key", SECRET)[0] > 0


def plan_rows(session: Any) -> list[int]:
    """Rows that the engine was given so far, by slot and step. Prompts alone are read here: every answer is one token."""
    return [rows.count for plan in session.executor.plans for rows in plan.active]


@pytest.mark.parametrize(
    "key", ["", "thief", "victim-key ", "VICTIM-KEY", "victim-ke", "victim-key\x00", "victim-key,victim-key", "a" * 60_000]
)
def test_no_other_key_opens(key: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("victim-key\n", "utf-8")
    with serving(fake_session(1, text_folder=tmp_path), keys=read_keys(tmp_path / "keys")) as server:
        port = int(server.url.rpartition(":")[2])
        others = ("//v1/models", "/v1/../v1/models", "/V1/models", "/v1/models/", "/%76%31/models", "/v1%2fmodels")
        for path in ("/v1/models", *others):
            status, body = asyncio.run(ask_raw(port, path, b"", method="GET", headers=f"Authorization: Bearer {key}\r\n"))
            assert status in (400, 401, 404) or key.strip() == "victim-key", body
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer victim-key"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/v1/models/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/a.html", "/v1/models/..%2f..%2fetc"],
)
def test_no_path_reads_a_file(path: str, tmp_path: Path) -> None:
    with serving(fake_session(1, text_folder=tmp_path)) as server:
        status, body = asyncio.run(ask_raw(int(server.url.rpartition(":")[2]), path, b"", method="GET"))
        assert status == 404 and b"root:" not in body


def test_a_log_line_stays_one_line_of_json_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(fake_session(1, text_folder=tmp_path)) as server, caplog.at_level("INFO", "medusa_deploy.serve"):
        server.complete("secret prompt", max_tokens=1, **{'x"\n{"event":"forged"}': 1, "\u2028": 2, "a" * 5000: 3})
        server.http.get("/v1/%0a%7b%22event%22%3a%22forged%22%7d")
        time.sleep(0.2)
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "medusa_deploy.serve"]
    assert len(lines) == 2
    for line in lines:
        assert "\n" not in line and "\u2028" not in line and len(line) < 2000 and "secret" not in line
        assert json.loads(line)["event"] == "request"


def test_a_template_bomb_holds_up_nobody_who_asks_for_health(tmp_path: Path) -> None:
    session = fake_session(1, text_folder=tmp_path)
    bomb = "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = messages | tojson %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(bomb, "utf-8")
    with serving(session) as server:
        found: list[httpx.Response] = []
        asking = [threading.Thread(target=lambda: found.append(_chat(server))) for _ in range(4)]
        for thread in asking:
            thread.start()
        while any(thread.is_alive() for thread in asking):
            assert server.http.get("/health").status_code == 200
        assert [each.status_code for each in found] == [400] * 4
        assert {each.json()["error"]["code"] for each in found} == {"template_error"}


def _chat(server: Running) -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a" * 1000}], "max_tokens": 1})
