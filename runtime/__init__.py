"""The runtime: load a bundle and generate. Imports numpy and the standard library; engines come in when a bundle is loaded."""

from .errors import DeployError
from .request import Chunk, Generation, Request, Rows
from .sampling import SamplingParams
from .session import Session, load
from .tree import ROOT_ONLY, Tree, chain

__all__ = [
    "ROOT_ONLY", "Chunk", "DeployError", "Generation", "Request", "Rows", "SamplingParams", "Session", "Tree", "chain", "load",
]  # fmt: skip
