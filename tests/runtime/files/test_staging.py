"""Two processes with one output: neither destroys the other's work."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime.errors import BundleExistsError
from medusa_deploy.runtime.files.bundle import staged_folder


def test_a_second_run_leaves_the_first_ones_folder_alone(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with staged_folder(output) as first:
        (first / "a").write_text("first")
        with staged_folder(output) as second:
            (second / "b").write_text("second")
            assert (first / "a").read_text() == "first"
        assert (output / "b").read_text() == "second"
        (output / "b").unlink()
        output.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (output / "a").read_text() == "first"


def test_the_slower_of_two_runs_is_refused_without_force(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(BundleExistsError), staged_folder(output) as slower:
        (slower / "a").write_text("slower")
        with staged_folder(output) as faster:
            (faster / "b").write_text("faster")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert [path.name for path in output.iterdir()] == ["b"]


def test_the_last_of_two_runs_with_force_stays(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with staged_folder(output, force=True) as slower:
        (slower / "a").write_text("slower")
        with staged_folder(output, force=True) as faster:
            (faster / "b").write_text("faster")
    assert [path.name for path in output.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".bundle.partial-old").mkdir()
    with staged_folder(tmp_path / "bundle") as staging:
        (staging / "a").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
