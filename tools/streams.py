"""Makes standard streams that can be used: in another encoding than UTF-8, full or closed."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from typing import TextIO

_PLAIN = {"─": "-", "│": "|", "…": "...", "·": "*", "×": "x", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "Σ": "sum", "±": "+-"}
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_ESCAPE = "medusa-deploy-escape"


def prepare_streams() -> None:
    """Let stdout and stderr write any text; what their encoding lacks is replaced by plain signs or escaped.

    A closed stdout refuses what is written to it. A closed stderr takes everything: it holds progress alone. A closed stdin is
    empty.
    """
    codecs.register_error(_ESCAPE, _escape)
    sys.stdout = sys.stdout or _refusing()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ESCAPE)


def _refusing() -> TextIO:
    """Open a stream that nothing can be written to, as a closed one."""
    return open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: PTH123


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text), error.end


def refused_output(error: Exception) -> Exception:
    """Return the named error for a stdout that refused what was written; any other error as it is."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _REFUSALS:
        return error
    with contextlib.suppress(OSError, ValueError):  # or Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from ..runtime.errors import OutputError

    named = OutputError(f"can't write to standard output: {error.strerror}", hint="free some space, or write elsewhere")
    named.__cause__ = error
    return named
