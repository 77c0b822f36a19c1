"""Huge pages: memory that a block allocates gets them, its contents stay, and nothing else changes."""

from __future__ import annotations

import mmap
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.runtime.executors import huge_pages

HUGE = 1 << 21


def settled() -> None:
    for thread in threading.enumerate():
        if thread.name == "huge-pages":
            thread.join(30)


def in_huge_pages(array: np.ndarray) -> int:
    """Bytes in huge pages of the mappings that overlap ``array``."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text("utf-8", "replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(part, 16) for part in found.groups())
            inside = start < array.ctypes.data + array.nbytes and array.ctypes.data < end
        elif inside and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total


def mapped(nbytes: int) -> np.ndarray:
    """Memory of a mapping: numpy asks for huge pages for its own."""
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.int32)


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone")
def test_memory_in_use_gets_huge_pages_and_untouched_memory_stays_untouched() -> None:
    with huge_pages.huge_pages():
        full, empty = mapped(16 * HUGE), mapped(64 * HUGE)
        full[:] = np.arange(full.size)
        before = resident()
    settled()
    assert resident() - before < 16 * HUGE, "memory that nobody touched was filled"
    assert np.array_equal(full, np.arange(full.size, dtype=np.int32))
    assert not empty.any()
    if not in_huge_pages(full):
        pytest.skip("this kernel gives no huge pages when it is asked")
    assert in_huge_pages(full) >= full.nbytes // 2


@pytest.mark.parametrize(
    ("spans", "others", "left"),
    [
        ([(0, 9)], [], [(0, 9)]),
        ([(0, 9)], [(0, 9)], []),
        ([(0, 9)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 9)]),
        ([(2, 5), (6, 9)], [(0, 3), (4, 8)], [(3, 4), (8, 9)]),
        ([(5, 9)], [(0, 5), (9, 12)], [(5, 9)]),
    ],
)
def test_only_what_is_new_is_touched(
    spans: list[huge_pages.Span], others: list[huge_pages.Span], left: list[huge_pages.Span]
) -> None:
    def scaled(parts: list[huge_pages.Span]) -> list[huge_pages.Span]:
        return [(start * HUGE, end * HUGE) for start, end in parts]

    assert huge_pages._without(scaled(spans), scaled(others)) == scaled(left)  # the one seam that takes addresses


def test_a_system_without_huge_pages_starts_no_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    for setting in (tmp_path / "enabled", tmp_path / "missing"):
        monkeypatch.setattr(huge_pages, "_SETTING", setting)
        before = threading.enumerate()
        with huge_pages.huge_pages():
            kept = np.ones(8 * HUGE, np.int8)
        assert threading.enumerate() == before
        assert kept.all()
