"""A process that forks after ``load``: the child decodes, and ends with its own status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os, sys
from medusa_deploy.runtime import load
session = load(sys.argv[1], threads=int(sys.argv[2]), check_hashes=False)
session.generate(token_ids=[1, 2, 3], max_new_tokens=4)
child = os.fork()
if child == 0:
    session.generate(token_ids=[1, 2, 3], max_new_tokens=4)
    sys.exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no on_exit")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_ends_with_its_status(tiny_bundle: Path, threads: int) -> None:
    source = str(Path(__file__).parents[3] / "src")
    command = [sys.executable, "-c", CHILD, str(tiny_bundle), str(threads)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, timeout=60, check=False)
    assert done.returncode == 7
