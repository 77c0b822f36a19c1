"""The application on Ray Serve: two replicas, of which one is killed under load; affinity, and errors of its arguments."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.serve import ray_app
from support.documents import ROOT
from support.text import text_bundle

pytestmark = pytest.mark.ray

# On a machine that does other work, Ray's processes take minutes to start, and Ray gives up after seconds.
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("ray") / "bundle")


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'medusa-deploy[ray]'")
    from ray import serve

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {"env_vars": {"PYTHONPATH": paths, "MEDUSA_DEPLOY_CACHE": os.environ["MEDUSA_DEPLOY_CACHE"]}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_app.application({"bundle": str(bundle), "replicas": "2", "slots": "2"}), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, index: int, **more: Any) -> tuple[int, Any]:
    body = {"prompt": "abc" * (1 + index % 7), "max_tokens": 60, "temperature": 0.7, "seed": index, "ignore_eos": True, **more}
    try:
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=120, headers=more.pop("headers", None))
    except httpx.HTTPError as error:
        return 0, type(error).__name__
    return found.status_code, found.json()["choices"][0]["text"] if found.status_code == 200 else found.text


def replicas() -> list[int]:
    """Process ids of the replicas. Ray gives its processes the names of their actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"ServeReplica:default:medusa" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_one_replica_is_killed_under_load_and_only_its_requests_fail(url: str) -> None:
    alone = [ask(url, index) for index in range(14)]
    assert {status for status, _ in alone} == {200}
    pids = replicas()
    assert len(pids) == 2
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, index % 14) for index in range(120)]
        while sum(each.done() for each in asked) < 20:
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)
        found = [each.result() for each in asked]
    failed = [answer for answer in found if answer[0] != 200]
    assert len(failed) <= 8, failed  # no more than were under way
    assert all(answer == alone[index % 14] for index, answer in enumerate(found) if answer[0] == 200)
    end = time.monotonic() + 120
    while len(set(replicas()) - {pids[0]}) < 2:
        assert time.monotonic() < end, "the replica isn't replaced"
        time.sleep(0.5)


def test_streams_metrics_and_a_client_that_leaves(url: str) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        events = [line[6:] for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert ask(url, 0, temperature=0, max_tokens=40)[1] == text
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "max_tokens": 200}, timeout=60) as stream:
        next(stream.iter_lines())
    assert httpx.get(f"{url}/health", timeout=30).json()["status"] == "ready"


def test_a_session_stays_with_its_replica(url: str) -> None:
    """Its slots hold the session's earlier prompts, so nothing of them is read again."""
    prompt = "a long prompt that comes again and again " * 3
    for session in ("one", "two", "three"):
        cached = []
        for turn in range(4):
            found = httpx.post(
                f"{url}/v1/completions",
                json={"prompt": prompt + session * turn, "max_tokens": 2, "cache_salt": session},
                headers={"x-session-id": session},
                timeout=60,
            )
            cached.append(found.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0 and min(cached[1:]) > 0


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bundle": "/nowhere"}, {"replicas": "no"}, {"replicas": 3, "most_replicas": 2}, {"colour": 1}, {"max_waiting": "x"}],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], bundle: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'medusa-deploy[ray]'")
    with pytest.raises(UsageError) as caught:
        ray_app.application({"bundle": str(bundle), **arguments} if arguments else {})
    assert caught.value.hint
