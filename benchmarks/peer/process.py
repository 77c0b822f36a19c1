"""The parent's side: a worker process to talk to, and the measurement that interleaves them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from medusa_deploy.tools.measure.timed_run import in_turn

Job = TypeVar("Job")
Done = TypeVar("Done")
_TICKS = os.sysconf("SC_CLK_TCK")


class PeerError(Exception):
    """A system can't be prepared, loaded or run. The message is one line for the report."""


class Talker(Protocol):
    """What the measurement needs of a worker."""

    pid: int

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt on one system. ``other_cpus``: processors that the rest of the machine kept busy meanwhile."""

    prompt: int
    tokens: list[int]
    seconds: float
    first_token_seconds: float | None
    steps: int | None
    other_cpus: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second with the prefill."""
        return len(self.tokens) / self.seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second from the first token on."""
        if self.first_token_seconds is None or len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / (self.seconds - self.first_token_seconds)


class Worker:
    """A worker process. Its stderr goes to ``log``; ``greeting`` is what it said first."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        environment = {**child_environment(), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, text=True, encoding="utf-8"
            )
        self.pid = self.process.pid
        self.greeting = self._answer()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Raises:
            PeerError: the worker answered with an error, or died.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._death()) from None
        return self._answer()

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _death(self) -> str:
        status = self.process.wait()
        end = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        return f"{end}: {last_line(self.log)}"


def child_environment() -> dict[str, str]:
    """The environment of a child: it finds this package, whichever interpreter it is, and asks no hub."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def measure(
    workers: Mapping[str, Talker],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[int, str], None],
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Run every prompt on every system before the next prompt, so that the machine's noise meets all alike.

    Returns:
        The runs of each system, and why a system dropped out on the way (its runs are left out).
    """
    rounds = [(number, prompt) for _ in range(repeats) for number, prompt in enumerate(prompts)]
    return in_turns(workers, rounds, lambda worker, job: _one_run(worker, *job, max_new_tokens), progress)


def in_turns(
    workers: Mapping[str, Talker],
    jobs: Sequence[Job],
    run: Callable[[Talker, Job], Done],
    progress: Callable[[int, str], None],
) -> tuple[dict[str, list[Done]], dict[str, str]]:
    """Let every system do a job before the next job. Returns what came of it, and why systems dropped out on the way."""
    found: dict[str, list[Done]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for turn, job in enumerate(jobs):
        for name in in_turn(workers, turn):
            if name in failed:
                continue
            progress(turn, name)
            try:
                found[name].append(run(workers[name], job))
            except PeerError as error:
                failed[name] = str(error)
            settle(workers[name].pid)
    return {name: done for name, done in found.items() if name not in failed}, failed


def watched(worker: Talker, what: str, **arguments: Any) -> tuple[dict[str, Any], float]:
    """Send a command. Returns the answer, and how many processors the rest of the machine kept busy meanwhile."""
    started, machine, own = time.perf_counter(), busy_seconds(), process_seconds(worker.pid)
    answer = worker.ask(what, **arguments)
    elapsed = time.perf_counter() - started
    others = (busy_seconds() - machine) - (process_seconds(worker.pid) - own)
    return answer, max(0.0, others / elapsed)


def _one_run(worker: Talker, number: int, prompt: Sequence[int], max_new_tokens: int) -> Run:
    answer, others = watched(worker, "run", token_ids=list(prompt), max_new_tokens=max_new_tokens)
    return Run(
        prompt=number,
        tokens=answer["token_ids"],
        seconds=answer["seconds"],
        first_token_seconds=answer["first_token_seconds"],
        steps=answer["steps"],
        other_cpus=others,
    )


def settle(pid: int, limit: float = 3.0, interval: float = 0.05) -> None:
    """Wait until a process stopped computing: thread pools spin for a while after their work is done."""
    deadline = time.monotonic() + limit
    before = process_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(interval)
        now = process_seconds(pid)
        if now - before < 1.5 / _TICKS:
            return
        before = now


def process_seconds(pid: int) -> float:
    """Processor time that a process has used; 0 where the kernel doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def busy_seconds() -> float:
    """Processor time that all processors together weren't idle; 0 where the kernel doesn't tell."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / _TICKS
