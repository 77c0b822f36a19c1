"""Reads JSON that somebody else wrote: checks the size first, and turns every failure into a named error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DeployError


def read_json_file(path: Path, *, limit: int, error: type[DeployError], hint: str, too_large: str | None = None) -> Any:
    """Returns the file's content. ``limit`` is in bytes. ``too_large``: hint for a file over the limit (None: ``hint``).

    Raises:
        DeployError: as an ``error``: the file is missing, unreadable, over ``limit``, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path} has {size} bytes, over the limit of {limit}", hint=too_large or hint)
        return json.loads(path.read_bytes())
    except OSError as failure:
        raise error(f"{path} can't be read: {failure.strerror or failure}", hint=hint) from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is not JSON: {failure}", hint=hint) from None
