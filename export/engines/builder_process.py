"""Builds one plan in a process of its own.

TensorRT swallows Ctrl-C while it builds. When memory runs out or its compiler fails, it may end its process: here the caller
survives with a named error. The request goes in as one line of JSON. Progress and the result come out as lines of JSON. When the
caller dies, its end of the pipe closes, and this process ends too.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime import errors
from ...runtime.files.engine_record import BuildLog, Range, TensorRecord

Advance = Callable[[str, int, int], bool]
"""Hears ``(phase, profiles done, profiles)`` at least once a second; False stops the build."""

_HEARTBEAT = 1.0  # seconds
_PROFILE_PHASE = "Computing profile costs"  # takes most of the time, with equally many steps for every profile
# A plan holds this once a layer and profile: a call of fused attention, for several rows or for one.
_ATTENTION_CALL = re.compile(r"_gem[mv]_mha_v\d")
_CALL = re.compile(rb"(?:function|runtime_fusion)=\{ name=(\w+)")
_PRODUCT = re.compile(rb'fully_connected=\{ name="[^"]*" output=\{[^}]*\} ?input=\{"([^"]+)" "([^"]+)"')
_TENSOR = re.compile(
    rb'tensor=\{ [^\n]{0,99}?(?:const_payload_size=(\d+) )?dims=[^\n]{0,400}? name="([^"]+)" [^\n]{0,400}? type=(\w+)'
)


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Asks for one plan: ``graph`` to ``output``. ``axes``, ``profiles``: see :func:`input_shapes`. All paths are absolute."""

    backend: str
    target: str
    graph: str
    output: str
    axes: dict[str, str]
    profiles: tuple[dict[str, Range], ...]
    features: tuple[str, ...] = ()
    timing_cache: str | None = None


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """Describes a built plan: the network's inputs and outputs, the builder's warnings, and a log of the build."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    warnings: tuple[str, ...]
    log: BuildLog


def build_plan(request: BuildRequest, advance: Advance) -> BuiltPlan:
    """Build in a process of its own, which is gone when this returns or raises.

    Raises:
        EngineError: TensorRT refused, was stopped, or died.
        EngineMemoryError: it ran out of memory, or was killed for it.
        MissingDependencyError, OSError: the package or the file system won't do.
    """
    package_root = str(Path(__file__).absolute().parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=True,  # a Ctrl-C on the terminal is the caller's to handle
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(request)) + "\n")
            process.stdin.flush()
            for message in _messages(process):
                if "built" in message:
                    return _built_plan(message["built"])
                if "error" in message:
                    raise _error(message)
                if not advance(message["phase"], message["done"], message["total"]):
                    raise errors.EngineError(f"the build for {request.target} was stopped", hint="start it again")
        except BrokenPipeError:
            pass  # it died before it read its request: its exit says why
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4096))
        raise _died(request.target, process.returncode, stderr.read().decode("utf-8", "replace"))


def _messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the process's messages, and its last progress again after every second of silence."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        process.wait()
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    last: dict[str, Any] = {"phase": "starting the builder", "done": 0, "total": 0}
    while True:
        try:
            line = lines.get(timeout=_HEARTBEAT)
        except queue.Empty:
            yield last
            continue
        if not line:
            return
        message = json.loads(line)
        if "phase" in message:
            last = message
        yield message


def _close(pipe: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def _built_plan(raw: dict[str, Any]) -> BuiltPlan:
    inputs, outputs = (
        tuple(TensorRecord(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in raw[kind])
        for kind in ("inputs", "outputs")
    )
    return BuiltPlan(inputs, outputs, tuple(raw["warnings"]), BuildLog(**raw["log"]))


def _error(message: dict[str, Any]) -> Exception:
    kind = getattr(errors, message["error"], None)
    if kind is not None:
        return kind(message["message"], hint=message["hint"])  # type: ignore[no-any-return]
    if message["error"] == "OSError":
        return OSError(message["errno"], message["message"])
    return RuntimeError(f"the builder process failed:\n{message['message']}")


def _died(target: str, code: int, said: str) -> errors.EngineError:
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = said.strip().splitlines()[-3:]
    message = f"the builder for {target} died: {how}" + (f"; it said: {' '.join(tail)[:500]}" if tail else "")
    if code == -signal.SIGKILL or "bad_alloc" in said or "MemoryError" in said:
        return errors.EngineMemoryError(
            f"{message}; this is how a machine ends a process that takes too much memory", hint="use a machine with more memory"
        )
    return errors.EngineError(message, hint="report this with the output of: medusa-deploy doctor")


# -- inside the process --------------------------------------------------------------------------------------------


def run_request(request: BuildRequest, advance: Advance) -> BuiltPlan:
    """Build in this process; see :func:`build_plan`."""
    from ...runtime.files.bundle import sha256
    from .tensorrt import TensorRT

    started = time.perf_counter()
    advance("parsing", 0, len(request.profiles))
    graph, output = Path(request.graph), Path(request.output)
    parsed = TensorRT(request.backend).parse(graph)
    for sizes in request.profiles:
        parsed.add_profile(input_shapes(parsed.inputs, request.axes, sizes))
    parsed_at = time.perf_counter()
    done = 0

    def monitor(phase: str, _parent: str | None, steps_done: int, steps: int) -> bool:
        nonlocal done
        if phase == _PROFILE_PHASE and steps:
            done = steps_done * len(request.profiles) // steps
        return advance(phase, done, len(request.profiles))

    cache = None if request.timing_cache is None else Path(request.timing_cache)
    parsed.build(request.target, output, monitor, features=request.features, timing_cache=cache)
    built_at, peak = time.perf_counter(), _peak_rss()
    kernels, listed = plan_contents(output)
    constants = {kind: size // max(len(request.profiles), 1) for kind, size in listed.items()}  # each profile lists them
    log = BuildLog(
        network_sha256=sha256(graph),
        layers=parsed.layers,
        attention_calls=sum(count for name, count in kernels.items() if _ATTENTION_CALL.match(name)),
        kernels=kernels,
        constants=constants,
        parse_seconds=parsed_at - started,
        build_seconds=built_at - parsed_at,
        peak_rss_bytes=peak,
        plan_bytes=output.stat().st_size,
    )
    return BuiltPlan(parsed.inputs, parsed.outputs, parsed.warnings, log)


def input_shapes(inputs: Sequence[TensorRecord], axes: Mapping[str, str], sizes: Mapping[str, Range]) -> dict[str, list[Range]]:
    """Return the range of every axis of every input.

    ``axes`` has a letter for each axis of an input, and ``sizes`` the range of each letter. A dot takes the network's size, as do
    axes that aren't spelled out. An input that isn't listed varies in B alone.
    """
    shapes = {}
    for tensor in inputs:
        letters = axes.get(tensor.name, "B").ljust(len(tensor.shape), ".")
        shapes[tensor.name] = [
            (size, size, size) if letter == "." else sizes[letter] for letter, size in zip(letters, tensor.shape, strict=True)
        ]
    return shapes


def plan_contents(plan: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Count calls by the kernel's name, and bytes of constants by their type, as a plan of TensorRT-RTX spells them.

    ``…Fc`` is a product that the steps named before it are fused into. Products whose kernel is chosen on the device have the
    types of what they multiply for a name.
    """
    calls, constants, types = Counter[str](), Counter[str](), dict[bytes, str]()
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for size, name, kind in _TENSOR.findall(data):
            types[name] = kind.decode()
            constants[types[name]] += int(size or 0)
        for match in _CALL.finditer(data):
            calls[match[1].decode()] += 1
        for names in _PRODUCT.findall(data):
            calls["product({}, {})".format(*(types.get(name, "?") for name in names))] += 1
    return dict(calls.most_common()), {kind: size for kind, size in constants.most_common() if size}


def _peak_rss() -> int:
    # VmHWM is this program's own; getrusage's figure starts at that of the process that started it.
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def main() -> int:
    """Run the process: a request on stdin, messages on stdout. Returns the exit status."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr
    request = json.loads(sys.stdin.readline())
    request["profiles"] = tuple({axis: tuple(size) for axis, size in sizes.items()} for sizes in request["profiles"])
    threading.Thread(target=_end_with_caller, daemon=True).start()
    said = ("", -1)

    def say(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    def advance(phase: str, done: int, total: int) -> bool:
        nonlocal said
        if said != (phase, done):
            say({"phase": phase, "done": done, "total": total})
            said = phase, done
        return True

    try:
        say({"built": asdict(run_request(BuildRequest(**request), advance))})
    except errors.DeployError as error:
        say({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except MemoryError:
        say({"error": "EngineMemoryError", "message": "out of memory", "hint": "use a machine with more memory"})
    except OSError as error:
        say({"error": "OSError", "errno": error.errno, "message": error.strerror or str(error)})
    return 0


def _end_with_caller() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
