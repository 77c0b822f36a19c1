"""The process that builds, and the adapter's calls of the package ``tensorrt``, of which a stand-in answers here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_deploy.export.engines import gpu
from medusa_deploy.export.engines.builder_process import BuildRequest, BuiltPlan, build_plan
from medusa_deploy.export.engines.features import apply_features, features_of, has
from medusa_deploy.export.engines.tensorrt import TensorRT
from medusa_deploy.runtime.errors import EngineError, EngineMemoryError, MissingDependencyError, UsageError
from medusa_deploy.runtime.executors.tensorrt import engine as trt_engine

STAND_IN = Path(__file__).parents[2] / "support" / "standin"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``import tensorrt`` finds the stand-in, here and in processes that are started from here."""
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def request_for(folder: Path, do: str, **options: Any) -> BuildRequest:
    graph = {"inputs": {"tokens": [-1, -1], "carried_key.0": [-1, 2, -1, 16]}, "do": do, "pid file": str(folder / "pid")}
    (folder / "step.onnx").write_text(json.dumps(graph))
    profiles = ({"B": (1, 1, 2), "N": (1, 8, 8), "P": (1, 1, 1)}, {"B": (1, 1, 2), "N": (4, 4, 4), "P": (1, 4, 8)})
    axes = {"tokens": "BN", "carried_key.0": "B.P"}
    return BuildRequest("tensorrt", "sm_90", str(folder / "step.onnx"), str(folder / "step.plan"), axes, profiles, **options)


def build(folder: Path, do: str, **options: Any) -> tuple[BuiltPlan, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []

    def advance(*step: Any) -> bool:
        seen.append(step)
        return True

    return build_plan(request_for(folder, do, **options), advance), seen


def test_a_plan_is_built_in_another_process(tmp_path: Path) -> None:
    built, seen = build(tmp_path, "build")
    plan = json.loads((tmp_path / "step.plan").read_text())
    assert plan["profiles"][1] == {
        "tokens": [[1, 4], [1, 4], [2, 4]],
        "carried_key.0": [[1, 2, 1, 16], [1, 2, 4, 16], [2, 2, 8, 16]],
    }
    assert plan["flags"] == []
    assert plan["capabilities"] is None, "only TensorRT-RTX is told a GPU"
    assert [tensor.name for tensor in built.inputs] == ["tokens", "carried_key.0"]
    assert built.warnings == ("a warning",)
    assert built.log.layers == 3
    assert built.log.plan_bytes == (tmp_path / "step.plan").stat().st_size
    assert built.log.peak_rss_bytes > 1 << 20
    assert [step for step in seen if step[0] == "Computing profile costs"][-1] == ("Computing profile costs", 2, 2)


def test_what_is_asked_for_reaches_the_builder(tmp_path: Path) -> None:
    features = ("hardware-compatible", "refittable", "timing-cache", "version-compatible", "weight-streaming")
    cache = tmp_path / "cache"
    for kept in (b"+1", b"+1+1"):
        build(tmp_path, "build", features=features, timing_cache=str(cache))
        assert cache.read_bytes() == kept, "each build adds to it"
    plan = json.loads((tmp_path / "step.plan").read_text())
    assert set(plan["flags"]) == {"REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "WEIGHT_STREAMING"}
    assert plan["compatible"] == "AMPERE_PLUS"
    cache.write_bytes(b"damaged")
    with pytest.raises(EngineError, match="no timing cache") as caught:
        build(tmp_path, "build", features=("timing-cache",), timing_cache=str(cache))
    assert "delete it" in caught.value.hint


@pytest.mark.parametrize(
    ("do", "kind", "word"),
    [
        ("refuse", EngineError, "Surprise node_7: no such operator"),
        ("fail", EngineError, "no tactic"),
        ("no memory", EngineMemoryError, "bad_alloc"),
        ("raise MemoryError", EngineMemoryError, "out of memory"),
        ("be killed", EngineMemoryError, "SIGKILL"),
        ("crash", EngineError, "SIGSEGV; it said: .*something broke"),
    ],
)
def test_a_build_that_fails_says_why(tmp_path: Path, do: str, kind: type[EngineError], word: str) -> None:
    with pytest.raises(EngineError, match=word) as caught:
        build(tmp_path, do)
    assert type(caught.value) is kind
    assert caught.value.hint


def test_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    request = request_for(tmp_path, "build")
    with pytest.raises(OSError, match="No space left"):
        build_plan(
            BuildRequest(**{**{name: getattr(request, name) for name in request.__slots__}, "output": "/dev/full"}),
            lambda *_: True,
        )


def test_a_stopped_or_interrupted_build_ends_its_process(tmp_path: Path) -> None:
    def interrupt(*_step: Any) -> bool:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        build_plan(request_for(tmp_path, "take long"), interrupt)
    assert gone(int((tmp_path / "pid").read_text()))
    (tmp_path / "pid").unlink()
    with pytest.raises(EngineError, match="was stopped"):
        build_plan(request_for(tmp_path, "take long"), lambda *_step: not (tmp_path / "pid").exists())
    assert gone(int((tmp_path / "pid").read_text()))


def test_the_process_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    request = request_for(tmp_path, "take long")
    program = (
        "import sys; sys.path[:] = sys.argv[2:]\nimport json\n"
        "from medusa_deploy.export.engines.builder_process import BuildRequest, build_plan\n"
        "build_plan(BuildRequest(**json.loads(sys.argv[1])), lambda *_: True)"
    )
    raw = json.dumps({name: getattr(request, name) for name in request.__slots__})
    caller = subprocess.Popen([sys.executable, "-c", program, raw, *sys.path])
    waited = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < waited:
        time.sleep(0.05)
    builder = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait()
    assert gone(builder)


def gone(pid: int) -> bool:
    """Whether a process ends within a few seconds; a zombie has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        threading.Event().wait(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_the_full_package_builds_for_the_gpu_of_this_machine() -> None:
    full = TensorRT("tensorrt")
    assert full.targets == ("here",)
    full.check_target("here")
    with pytest.raises(UsageError, match="sm_90") as caught:
        full.check_target("sm_90")
    assert "--hardware-compatible" in caught.value.hint
    full.check_target("sm_90", ["hardware-compatible"])
    with pytest.raises(UsageError, match="sm_75"):
        full.check_target("sm_75", ["hardware-compatible"])


def test_features_are_a_table_with_both_backends() -> None:
    assert has("tensorrt", "timing-cache")
    assert not has("tensorrt-rtx", "timing-cache")
    assert set(features_of("tensorrt")) | set(features_of("tensorrt-rtx")) >= {"runtime-cache", "cross-build", "refittable"}


def test_a_version_without_a_feature_is_named() -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__="10.0", BuilderFlag=SimpleNamespace())
    with pytest.raises(EngineError, match=r"tensorrt 10\.0 has no weight-streaming"):
        apply_features(old, SimpleNamespace(set_flag=lambda flag: None), ["weight-streaming"], None)


def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(trt_engine, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(MissingDependencyError, match="no tensorrt_rtx") as caught:
        TensorRT("tensorrt-rtx")
    assert "medusa-deploy[tensorrt-rtx]" in caught.value.hint
    with pytest.raises(UsageError):
        TensorRT("tensorflow")


def test_the_gpu_is_asked_for_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(place: Any, which: int, _device: Any) -> int:
        place._obj.value = {75: 8, 76: 6}[which]
        return 0

    driver = SimpleNamespace(cuInit=lambda _: 0, cuDeviceGet=lambda _place, _index: 0, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(gpu, "_driver", lambda: driver)
    assert gpu.resolve_target("here") == "sm_86"
    assert gpu.resolve_target("sm_120") == "sm_120"
    driver.cuInit = lambda _: 100
    with pytest.raises(EngineError, match="error 100") as caught:
        gpu.resolve_target("here")
    assert "sm_89" in caught.value.hint


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(CDLL=missing))
    with pytest.raises(EngineError, match="no GPU here"):
        gpu.resolve_target("here")
