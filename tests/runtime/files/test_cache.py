"""The cache's folder: what is removed, what stays, and who may use an entry at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.files import cache
from support.documents import ROOT

DAY = 24 * 3600


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def make(root: Path) -> Callable[..., Path]:
    """Makes an entry that was last used so many seconds ago."""

    def made(name: str, nbytes: int = 10, ago: float = 0) -> Path:
        entry = root / (name if name.startswith(".") else name * 32)
        entry.mkdir()
        (entry / "1.bin").write_bytes(bytes(nbytes))
        os.utime(entry, (time.time() - ago, time.time() - ago))
        return entry

    return made


def test_the_least_recently_used_go_first(root: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    newest, older, oldest = make("a", 40), make("b", 40, ago=100), make("c", 40, ago=200)
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", "80")
    assert cache.usage() == cache.Usage(root, 3, 120, 80)
    cache.prune(root, lambda _entry: True)
    assert (newest.exists(), older.exists(), oldest.exists()) == (True, True, False), "stale ones have a day"
    os.close(cache.hold(older))  # used again
    cache.prune(root, lambda _entry: True)
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", "79")
    cache.prune(root, lambda _entry: False)
    assert (newest.exists(), older.exists()) == (False, True)
    assert cache.usage() == cache.Usage(root, 1, 40, 79)


def test_room_is_made_where_the_disk_lacks_it(root: Path, make: Callable[..., Path]) -> None:
    make("a"), make("b", ago=100)
    cache.prune(root, lambda _entry: False, room=1)
    assert cache.usage().entries == 2
    cache.prune(root, lambda _entry: False, room=1 << 62)
    assert cache.usage().entries == 0


def test_what_is_no_entry_stays(root: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable may name a folder that holds other things, too."""
    photos = make(".photos", ago=100 * DAY)
    (root / "letter.txt").write_text("dear")
    leftover, at_work = make(".partial-1", ago=100), make(".partial-2")
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", "0")
    cache.prune(root, lambda _entry: True, room=1 << 62)
    assert photos.exists() and (root / "letter.txt").exists() and at_work.exists()
    assert not leftover.exists()


def test_an_entry_that_another_process_holds_stays_until_that_ends(root: Path, make: Callable[..., Path]) -> None:
    entry = make("a", ago=100 * DAY)
    program = (
        "import sys, time; from pathlib import Path; from medusa_deploy.runtime.files import cache;"
        "held = cache.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    command = [sys.executable, "-c", program, str(entry)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        os.utime(entry, (0, 0))
        cache.prune(root, lambda _entry: True, room=1 << 62)
        assert (entry / "1.bin").exists()
        holder.kill()
    cache.prune(root, lambda _entry: True)
    assert not entry.exists()


def test_an_entry_is_made_again_if_it_goes_while_somebody_opens_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, locked = root / ("a" * 32), []

    def removed_meanwhile(handle: int, how: int) -> None:
        locked.append(handle)
        if len(locked) == 1:
            entry.rmdir()

    monkeypatch.setattr(cache.fcntl, "flock", removed_meanwhile)
    os.close(cache.hold(entry))
    assert entry.is_dir() and len(locked) == 2


def test_what_is_half_made_goes_with_the_block(root: Path) -> None:
    with pytest.raises(OSError, match="full"), cache.staging(root) as staging:
        (staging / "1.bin").write_bytes(b"half")
        raise OSError("the disk is full")
    assert not list(root.iterdir())


@pytest.mark.parametrize("value", ["16G", "-1", "1.5", "٣", "9" * 30])
def test_a_wrong_number_of_bytes_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", value)
    with pytest.raises(UsageError, match="MEDUSA_DEPLOY_CACHE_BYTES") as caught:
        cache.usage()
    assert "number of bytes" in caught.value.hint


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "nowhere"))
    assert cache.usage() == cache.Usage(tmp_path / "nowhere", 0, 0, cache.DEFAULT_BYTES)
    assert cache.mount_point(tmp_path / "nowhere").is_mount()
