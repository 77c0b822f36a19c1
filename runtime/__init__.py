"""The runtime: load a bundle and generate. Imports numpy and the standard library; engines come in when a bundle is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import DeployError
from .grammar import Grammar
from .request import Chunk, Generation, Request, Rows
from .sampling import SamplingParams
from .session import Session, load
from .tree import ROOT_ONLY, Tree, chain

if TYPE_CHECKING:
    from .async_session import AsyncSession

__all__ = [
    "ROOT_ONLY", "AsyncSession", "Chunk", "DeployError", "Generation", "Grammar", "Request", "Rows", "SamplingParams", "Session",
    "Tree", "chain", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what needs asyncio when it is first asked for."""
    if name != "AsyncSession":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .async_session import AsyncSession

    return AsyncSession
