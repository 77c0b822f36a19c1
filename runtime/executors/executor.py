"""The interface of engines: abilities, and one call that runs a step plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .step_plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes of the caches: ``2 * layers`` tensors [slots, kv_heads, rows, head_dim]."""

    layers: int
    slots: int
    kv_heads: int
    rows: int
    head_dim: int
    dtype: str  # numpy name: float32 or float16


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an executor can do.

    ``slots``: sequences at a time. ``deepest``: drafted tokens that one step can accept. ``step_rows``: the numbers of rows that
    its steps have, ascending; other numbers are padded to the next larger one (None: any number). ``padded``: one step pads the
    rows of all slots to one number, so that the slots share the choice of it. ``packed``: one step takes any rows of all slots,
    those of a prompt among them, so that the slots share their sum. ``ahead``: it can start ``StepPlan.follow`` before the host
    has read the step before it. ``copies``: it can copy rows from one slot to another, as :class:`CopyingExecutor` says.
    ``prompt_rows``: rows of a prompt that are as cheap each as a longer chunk's, so that steps need no more (None: unknown).
    """

    slots: int
    deepest: int
    step_rows: tuple[int, ...] | None = None
    padded: bool = False
    packed: bool = False
    ahead: bool = False
    copies: bool = False
    prompt_rows: int | None = None


class Executor(Protocol):
    """Owns the engine and the caches of all slots. One call at a time.

    The loop is its only caller. It may run several engine calls for one plan; a call that fails fails its own slots alone.
    """

    @property
    def abilities(self) -> Abilities:
        """What it can do; never changes."""
        ...

    layout: CacheLayout
    engine_seconds: float
    """Wall time spent inside the engine so far."""

    def run(self, plan: StepPlan) -> StepResult:
        """Move accepted rows into place, write the plan's rows into the caches, and verify them.

        All moves of the plan are done afterwards, those of slots whose call failed excepted.
        """
        ...

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run the heads at rows that the host accepted: hidden [b, H], root int64 [b] to candidates and log_probs [b, K, k]."""
        ...


class CopyingExecutor(Executor, Protocol):
    """An executor with the ability ``copies``."""

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of the slot ``source`` to the slot ``target``, whose other rows lose their meaning."""
        ...
