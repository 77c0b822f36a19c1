"""Requests and answers: the records that pass between an application and a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .arguments import flag, is_integer, is_number, shown
from .errors import UsageError
from .grammar import Grammar
from .sampling import SamplingParams
from .tree import Tree

if TYPE_CHECKING:
    from .drafting.draft import Drafter

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else the chat template reads: all texts but ``tool_calls``, which are JSON."""

MAX_LOGPROBS = 20
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Drafting by the most promising rows, new ones in each step (:class:`.draft.BestRows`).

    ``count``: rows of every step, the root included. None takes as many as pay, chosen in each step (:mod:`.row_budget`); the
    mode typical, whose text depends on the drafts, then takes as many as the bundle's tree has. ``lookup``: whether text that
    repeats itself drafts too (:mod:`.lookup`); None says yes. Executors that run ahead of the host take the bundle's tree where
    neither is given.
    """

    count: int | None = None
    lookup: bool | None = None

    def __post_init__(self) -> None:
        if self.count is not None and not (is_integer(self.count) and self.count >= 1):
            raise UsageError(f"rows is {shown(self.count)}", hint="rows is an integer from 1: the root counts")
        object.__setattr__(self, "count", None if self.count is None else int(self.count))
        object.__setattr__(self, "lookup", None if self.lookup is None else flag("lookup", self.lookup))


AUTOMATIC = Rows()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it: exactly one of ``prompt``, ``messages`` and ``token_ids``.

    ``drafting``: how steps are drafted, by :class:`Rows`, by a tree that is the same in every step (``ROOT_ONLY`` decodes
    plainly), or by a drafter of one's own. ``tree``, ``rows``, ``lookup`` and ``drafter`` are older names for parts of it.
    ``priority``: smaller numbers are served first. ``deadline``: seconds from submission after which the request is cancelled.
    ``cancel`` is asked before each of its steps but the first. ``cache_salt``: a prompt's beginning is taken over from earlier
    requests of the same salt alone, so that the time of an answer tells nobody what others asked. ``keep_hidden`` collects the
    backbone's hidden state behind every emitted token. ``logprobs``: wants the log-probability of every emitted token, and of so
    many most likely ones at its place; they are the model's own, before temperature, penalties and filters.

    ``grammar``: every emitted token is one that it allows. The answer ends where nothing can follow, or where it may end and the
    model says so. Needs the extra ``guided``. ``tools``: functions that the chat template shows to the model, in OpenAI's form.

    None is the default of every field. Numbers may be numpy's.

    Raises:
        UsageError: two of the ways to draft are given, or a value has a wrong type.
    """

    prompt: str | None = None
    messages: SequenceOf[Message] | None = None
    token_ids: SequenceOf[int] | None = None
    max_new_tokens: int = 128
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    drafting: Rows | Tree | Drafter = AUTOMATIC
    priority: int = 0
    deadline: float | None = None
    cancel: Callable[[], bool] | None = None
    keep_hidden: bool = False
    cache_salt: str = ""
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: SequenceOf[Mapping[str, Any]] | None = None
    tree: InitVar[Tree | None] = None
    rows: InitVar[int | None] = None
    lookup: InitVar[bool | None] = None
    drafter: InitVar[Drafter | None] = None

    def __post_init__(self, tree: Tree | None, rows: int | None, lookup: bool | None, drafter: Drafter | None) -> None:
        self._normalise()
        given = {"tree": tree, "rows": rows, "lookup": lookup, "drafter": drafter}
        names = [name for name, value in given.items() if value is not None]
        if drafter is not None and not callable(getattr(drafter, "draft", None)):
            raise UsageError(f"drafter is {shown(drafter)}", hint="a drafter has rows and the method draft")
        if not isinstance(tree, (Tree, type(None))):
            raise UsageError(f"tree is {shown(tree)}", hint="tree is a Tree: Tree.from_choices makes one")
        if not names:
            return
        if self.drafting is not AUTOMATIC:
            raise UsageError(f"got drafting and {', '.join(names)}", hint="give drafting alone: the others are parts of it")
        if tree is not None and rows is not None:
            raise UsageError(f"got a tree and {rows} rows", hint="give one of them: a tree has its own number")
        if drafter is not None and len(names) > 1:
            others = ", ".join(name for name in names if name != "drafter")
            raise UsageError(f"got a drafter and {others}", hint="a drafter chooses the rows: leave the others out")
        if tree is not None and lookup:
            raise UsageError("got a tree and lookup=True", hint="a tree's rows come from the heads alone: leave one of them out")
        object.__setattr__(self, "drafting", tree or drafter or Rows(rows, lookup))

    def _normalise(self) -> None:
        """Replace None by defaults and numpy's numbers by Python's; refuse other types."""
        kept: dict[str, object] = {
            name: flag(name, getattr(self, name)) for name in ("include_stop", "ignore_eos", "keep_hidden")
        }
        kept["params"] = SamplingParams() if self.params is None else self.params
        kept["drafting"] = AUTOMATIC if self.drafting is None else self.drafting
        kept["stop"] = () if self.stop is None else self.stop
        kept["cache_salt"] = "" if self.cache_salt is None else self.cache_salt
        for name, default in (("max_new_tokens", 128), ("priority", 0)):
            value = getattr(self, name)
            kept[name] = default if value is None else value if not is_integer(value) else int(value)
        for name, value in kept.items():
            object.__setattr__(self, name, value)
        drafts = isinstance(self.drafting, (Rows, Tree)) or callable(getattr(self.drafting, "draft", None))
        for name, right, hint in (
            ("params", isinstance(self.params, SamplingParams), "params is a SamplingParams"),
            ("drafting", drafts, "drafting is a Rows, a Tree or a drafter"),
            ("stop", isinstance(self.stop, (str, list, tuple)), 'stop is a list of non-empty strings such as ["\\n\\n"]'),
            ("max_new_tokens", is_integer(self.max_new_tokens), "max_new_tokens is an integer from 1"),
            ("priority", is_integer(self.priority), "priority is an integer; smaller ones are served first"),
            ("deadline", self.deadline is None or is_number(self.deadline), "a deadline is in seconds from now, and positive"),
            ("cache_salt", isinstance(self.cache_salt, str), "cache_salt is a string, such as the user's name"),
            ("logprobs", self.logprobs is None or _is_count(self.logprobs), f"logprobs is an integer from 0 to {MAX_LOGPROBS}"),
            ("grammar", isinstance(self.grammar, (Grammar, type(None))), "grammar is a Grammar, such as Grammar.json(schema)"),
            ("cancel", self.cancel is None or callable(self.cancel), "cancel is a function without arguments"),
        ):
            if not right:
                raise UsageError(f"{name} is {shown(getattr(self, name))}", hint=hint, argument=name)


def _is_count(value: object) -> bool:
    return is_integer(value) and 0 <= value <= MAX_LOGPROBS  # type: ignore[operator]


@dataclass(slots=True)
class Stats:
    """Cost of a generation. ``accepted[a]``: decode steps that accepted ``a`` drafted tokens.

    ``prompt_tokens``: tokens of the prompt whose rows are in the cache; ``cached_tokens`` of them were there before.

    ``queue_seconds``: from submission to a slot. ``rows_histogram[n]``: decode steps that verified n rows. ``plain_steps``: steps
    of one row in which no heads ran. ``probes``: steps that ran the heads only to see whether drafting pays again.
    ``lookup_steps``: steps whose rows were chosen among repeated text, too.

    Where the number of rows was left open, ``trust`` holds the factors that the probabilities of each head, and of lookup, were
    multiplied by. ``costs`` holds the cost of a step by its rows, and of the heads, against a plain step (:mod:`.row_budget`).
    Both are as of the end, or up to 16 steps before it where a stop string or the caller ended the generation.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    emitted: int = 0
    rows: int = 0
    rows_histogram: dict[int, int] = field(default_factory=dict)
    plain_steps: int = 0
    probes: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    lookup_steps: int = 0
    trust: list[float] | None = None
    costs: dict[str, float] | None = None
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    engine_seconds: float = 0.0

    def add_step(self, rows: int, accepted: int, emitted: int, *, heads: bool, looked_up: bool) -> None:
        """Count one decode step that kept ``emitted`` tokens. ``heads``: whether they ran for this sequence."""
        self.steps += 1
        self.rows += rows
        self.rows_histogram[rows] = self.rows_histogram.get(rows, 0) + 1
        self.plain_steps += rows == 1 and not heads
        self.lookup_steps += looked_up
        self.emitted += emitted
        self.accepted[accepted] = self.accepted.get(accepted, 0) + 1

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted drafted tokens per decode step."""
        total = sum(accepted * steps for accepted, steps in self.accepted.items())
        return 1.0 + total / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, the prefill excluded."""
        return self.emitted / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def host_fraction(self) -> float:
        """Share of the decoding time spent outside the engine."""
        return 1.0 - self.engine_seconds / self.decode_seconds if self.decode_seconds else 0.0


class TokenLogprob(NamedTuple):
    """An emitted token's log-probability, and the most likely tokens at its place with theirs, the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The addition of one step to a stream; the last one carries the finish reason. ``logprobs``: one entry a token."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. ``token_ids`` are all emitted tokens, an end-of-sequence token included.

    A stop string ends them at the token that completes it, as plain decoding does.

    ``error``: the reason where ``finish_reason`` is "error"; text and tokens are then those emitted before it.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    stats: Stats
    hidden: np.ndarray | None = None
    error: Exception | None = None
    logprobs: list[TokenLogprob] | None = None
