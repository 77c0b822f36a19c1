"""Defines the record of a loaded backbone, and the protocol by which a trace reads its weights."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...runtime.files.backbone import BackboneShape
from .logits import NO_CHANGE, LogitChange
from .safetensors_header import StoredTensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class WeightSource(Protocol):
    """Holds the weights of a backbone, in memory or in files."""

    def tracing(self) -> AbstractContextManager[object]:
        """Enter the mode that the module's parameters need while it is traced."""
        ...

    def stored(self, parameter: str) -> StoredTensor | None:
        """Return the place of a parameter in a file of the bundle, or None if the module holds its numbers."""
        ...


class LoadedWeights:
    """Weights in memory: the module's parameters hold the numbers."""

    def tracing(self) -> AbstractContextManager[object]:
        """Enter nothing: real parameters are traced as they are."""
        return contextlib.nullcontext()

    def stored(self, parameter: str) -> None:
        """Return None: no parameter lies in a file of the bundle."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A transformers causal LM, its sizes, its dtype, the source of its weights, and what follows its projection.

    ``warnings``: what the checkpoint holds and the bundle doesn't.
    """

    module: Any
    shape: BackboneShape
    dtype: torch.dtype
    weights: WeightSource = field(default_factory=LoadedWeights)
    warnings: tuple[str, ...] = ()
    logits: LogitChange = NO_CHANGE
