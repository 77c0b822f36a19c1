"""The application on Ray Serve: two replicas, of which one is killed under load; affinity, and errors of its arguments."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.serve import ray_app
from support.documents import ROOT
from support.hanging import HangingReplica
from support.text import text_bundle

pytestmark = pytest.mark.ray

# On a machine that does other work, Ray's processes take minutes to start, and Ray gives up after seconds.
_PATIENCE = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
# Where these ports are left to Ray, its scheduler waits 15 seconds for the processes that choose them, whatever is set.
_PORTS = ("port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("ray") / "bundle")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of one node with 2 CPUs and a small object store, whatever the machine has."""
    pytest.importorskip("ray", reason="needs ray: pip install 'medusa-deploy[ray]'")
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--num-cpus=2", "--object-store-memory=104857600", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_PATIENCE, "PYTHONPATH": paths}.items():
            patch.setenv(name, value)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as started:
            try:
                yield f"127.0.0.1:{ports['port']}"
            finally:
                os.killpg(started.pid, signal.SIGKILL)  # told to stop, it would drain for half a minute


@pytest.fixture(scope="module")
def url(bundle: Path, cluster: str) -> Iterator[str]:
    import ray
    from ray import serve

    [port] = free_ports(1)
    environment = {"env_vars": {"MEDUSA_DEPLOY_CACHE": os.environ["MEDUSA_DEPLOY_CACHE"]}}
    end = time.monotonic() + 900
    while True:
        try:
            ray.init(address=cluster, log_to_driver=False, runtime_env=environment)
            break
        except ConnectionError:
            assert time.monotonic() < end, "Ray doesn't start"
            time.sleep(5)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_app.application({"bundle": str(bundle), "replicas": "2", "slots": "2"}), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, index: int, **more: Any) -> tuple[int, Any]:
    body = {"prompt": "abc" * (1 + index % 7), "max_tokens": 200, "temperature": 0.7, "seed": index, "ignore_eos": True, **more}
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
    assert 1 <= len(failed) <= 8, failed  # no more than were under way
    assert {status for status, _ in failed} <= {0, 500}  # of Ray's proxy, or a connection that it closed
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


def test_requests_of_no_session_go_where_a_slot_is_free(url: str) -> None:
    """Each of the two replicas has two slots: of four requests none waits for one."""
    for turn in range(5):
        with ExitStack() as streams:
            lines = []
            for index in range(4):
                body = _long(turn * 4 + index) | {"stream": True}
                stream = streams.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120))
                lines.append(stream.iter_lines())
                next(lines[-1])
            began = time.monotonic()
            last = [[line for line in each if "speculative_decoding" in line][-1] for each in lines]
            took = time.monotonic() - began
        queued = [json.loads(line[6:])["metrics"]["queue_seconds"] for line in last]
        assert max(queued) < took / 2, (queued, took)


def _long(seed: int) -> dict[str, Any]:
    sampled = {"temperature": 0.7, "seed": seed, "ignore_eos": True}
    return {"prompt": "abc", "max_tokens": 200, "include_metrics": True, **sampled}


@pytest.fixture
def small(url: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One replica with one slot and one place to wait, whose steps hang while the file ``hang`` lies beside the bundle."""
    from ray import serve

    serve.delete("default")
    options = {"bundle": str(bundle), "replicas": 1, "slots": 1, "max_waiting": 1, "stall_seconds": "2", "drain_seconds": "1"}
    monkeypatch.setattr(ray_app, "Replica", HangingReplica)
    serve.run(ray_app.application(options), route_prefix="/")
    return url


def test_too_many_requests_are_refused_and_a_replica_that_hangs_is_replaced(small: str, bundle: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: httpx.post(f"{small}/v1/completions", json=_long(seed), timeout=120), range(8)))
    refused = [answer for answer in found if answer.status_code != 200]
    assert refused and {answer.status_code for answer in refused} <= {429, 503}
    told = [answer for answer in refused if answer.status_code == 429]
    assert told and all(answer.json()["error"]["code"] == "queue_full" and int(answer.headers["Retry-After"]) for answer in told)
    [pid] = replicas()
    (bundle.parent / "hang").touch()
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{small}/v1/completions", json=_long(0), timeout=10)
    httpx.post(f"{small}/v1/completions", json=_long(0), timeout=600)  # the answer of the replica that dies, or none
    (bundle.parent / "hang").unlink()
    end = time.monotonic() + 300
    while replicas() == [pid] or ask(small, 0)[0] != 200:
        assert time.monotonic() < end, "the replica isn't replaced"
        time.sleep(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"bundle": "/nowhere"}, {"replicas": "no"}, {"replicas": 3, "most_replicas": 2}, {"colour": 1}, {"max_waiting": "x"},
        {"otel": "maybe"},
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], bundle: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'medusa-deploy[ray]'")
    with pytest.raises(UsageError) as caught:
        ray_app.application({"bundle": str(bundle), **arguments} if arguments else {})
    assert caught.value.hint
