"""The commands and Python examples of the README and of the page that goes on from it, word for word, on the real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import FIRST_BUNDLE, README, ROOT, blocks, commands

pytestmark = pytest.mark.model
VERBS = {"export", "inspect", "generate", "verify", "bench", "compare", "tree", "calibrate", "quantise", "plan", "doctor"}


def runnable(words: list[str]) -> bool:
    """Not what the fixture has done, and no MODEL to be filled in."""
    return words[0] == "medusa-deploy" and words[1] != "prepare" and not any(re.fullmatch(r"[A-Z]+", word) for word in words)


def test_the_readme_and_the_first_bundle_do_what_they_say(smollm2_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "heads").symlink_to(ROOT / "heads")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "smollm2").symlink_to(smollm2_bundle.parent / "smollm2")
    pages = (README, FIRST_BUNDLE)
    programs = [["-m", "medusa_deploy", *words[1:]] for page in pages for words in commands(page) if runnable(words)]
    programs += [["-c", block] for page in pages for block in blocks(page, "python")]
    assert {words[2] for words in programs if words[0] == "-m"} >= VERBS
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    for words in programs:
        result = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip()
