"""Gives a finished folder its place, while other processes may do the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import BundleExistsError, DeployError

if TYPE_CHECKING:
    from pathlib import Path


def refuse_existing(output: Path, *, force: bool) -> None:
    """Refuses an output that exists. :func:`staged_folder` does so first; long work does so before it starts.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
    """
    if output.exists() and not force:
        raise BundleExistsError(f"{output} exists", hint="give another output, or --force to replace it")


def check_path(path: Path, error: type[DeployError]) -> None:
    """Refuses a path whose bytes aren't UTF-8, as ``error``: ONNX Runtime, tokenizers and safetensors open no other."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise error(f"the path {str(path)!a} is not UTF-8", hint="rename it, or choose another") from None


def remove_unlocked(leftover: Path) -> None:
    """Removes a temporary folder, unless the process that made it is still at work in it."""
    import fcntl
    import shutil

    try:
        handle = os.open(leftover, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(leftover, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(handle)


def replace_folder(staging: Path, output: Path, *, force: bool) -> None:
    """Renames ``staging`` to ``output``. Of several processes that do so at a time, the last one stays."""
    import errno
    import shutil
    import tempfile
    from pathlib import Path

    staging.chmod(0o755)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    old = aside / output.name
    try:
        while True:
            if output.exists():  # a folder can't be renamed over a full one
                output.rename(old)
            try:
                staging.rename(output)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if old.exists():
                        old.rename(output)
                    raise
                refuse_existing(output, force=force)  # another process was faster
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
