"""What a system under comparison is: it loads a model, and answers one prompt or several at a time, greedily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy generation, an end-of-sequence token included. ``first_token_seconds``: from the start of the run.

    ``steps``: backbone passes after the prefill, where that isn't one a token.
    """

    token_ids: list[int]
    first_token_seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What every system is loaded with. ``path``: the model in the system's own format. ``capacity``: prompt plus new tokens.

    ``slots``: prompts that it answers at a time. ``ignore_eos``: whether every answer has as many tokens as are asked for.
    """

    path: str
    threads: int
    capacity: int
    eos_token_ids: list[int]
    slots: int = 1
    ignore_eos: bool = False

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(() if self.ignore_eos else self.eos_token_ids)


class Peer(ABC):
    """A system under comparison. It runs a fixed number of threads."""

    module: ClassVar[str]
    roots: ClassVar[tuple[str, ...]]

    @abstractmethod
    def load(self, settings: Settings) -> None:
        """Make ready: for :meth:`run` with one slot, for :meth:`run_many` with several."""

    @abstractmethod
    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate greedily until an end-of-sequence token or ``max_new_tokens``; nothing is kept from earlier runs."""

    def run_many(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Answer all prompts, as many at a time as there are slots; the next one starts when an answer has ended."""
        raise NotImplementedError(f"{self.module} answers one prompt at a time here")
