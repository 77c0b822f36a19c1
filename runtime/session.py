"""The face of a loaded bundle: generate or stream text, many requests at a time, from any thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .arguments import flag, integer, path, shown
from .drafting.adaptive import AdaptiveDrafter
from .drafting.checked import CheckedDrafter
from .drafting.draft import BestRows, Drafter, FixedTree
from .drafting.guide import Guide, GuidedDrafter
from .drafting.lookup import PromptLookup
from .drafting.row_budget import SIZES, RowBudget
from .errors import CapacityError, DeployError, PromptError, UsageError
from .executors.executor import Executor
from .loop.driver import Driver
from .loop.handle import Handle
from .loop.loop import Loop
from .loop.sequence import Sequence
from .loop.slots import PrefixStats, SlotPool
from .request import Chunk, Generation, Message, Request, Rows, Stats
from .text.encoder import PromptEncoder
from .text.guidance import GrammarCompiler
from .text.output import TextOutput
from .text.stops import StopChecker
from .tree import ROOT_ONLY, Tree

if TYPE_CHECKING:
    from pathlib import Path

    from .files.bundle import Bundle

__all__ = ["Chunk", "Generation", "Message", "Request", "Session", "load"]


class Session:
    """A loaded bundle with one engine. Each step serves all its requests, as many at a time as there are slots.

    All methods may be called from several threads: whoever waits for a request drives the engine, for the others too.
    """

    def __init__(self, bundle: Bundle, executor: Executor, *, prefix_cache: bool = True) -> None:
        """``prefix_cache``: whether prompts may begin with rows that earlier requests left in free slots."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.executor = executor
        limits, heads, abilities = self.manifest.limits, self.manifest.heads, executor.abilities
        self.encoder = PromptEncoder(self.manifest.text, self.manifest.backbone.vocab_size, bundle.path)
        self.slots = SlotPool(
            abilities.slots, limits.capacity, keep=prefix_cache, copies=abilities.copies, together=abilities.padded
        )
        self.grammars = GrammarCompiler(self.encoder)
        self.tree = self.manifest.tree()
        step_rows = abilities.step_rows
        self.max_rows = limits.max_rows if step_rows is None else min(step_rows[-1], limits.max_rows)
        sizes = tuple(sorted({rows for rows in (1, *(step_rows or SIZES)) if rows <= self.max_rows}))
        shared = {"padded": abilities.padded, "packed": abilities.packed}
        self.row_budget = RowBudget(sizes, heads.num_heads, heads.platt_scaling, **shared)
        chunk = min(limits.prefill_chunk, abilities.prompt_rows or limits.prefill_chunk)
        self.loop = Loop(executor, self.slots, self.row_budget, chunk)
        self.driver = Driver(self.loop)

    # -- text ------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Any:
        """The bundle's tokenizer (:class:`.tokenizer.TextCodec`), or None when it speaks token ids only."""
        return self.encoder.codec

    @property
    def prefix_stats(self) -> PrefixStats:
        """What the prefix cache has saved so far."""
        return self.slots.prefix_stats

    def encode(self, request: Request) -> list[int]:
        """The request's prompt as token ids; see :meth:`.encoder.PromptEncoder.encode`."""
        return self.encoder.encode(request)

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> Generation:
        """Generate to the end. ``options`` are the fields of :class:`Request`; ``speculative=False`` decodes plainly.

        Raises:
            DeployError: the request is refused, or its generation failed.
        """
        handle = self.submit(request_of(prompt, speculative, options))
        try:
            return handle.result()
        finally:
            handle.cancel()

    def stream(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> Iterator[Chunk]:
        """Generate step by step. Closing the iterator cancels the generation and frees its slot.

        Raises:
            DeployError: when the first chunk is asked for: the request is refused; later: its generation failed.
        """
        return self._stream(request_of(prompt, speculative, options))

    def _stream(self, request: Request) -> Iterator[Chunk]:
        handle = self.submit(request)
        try:
            yield from handle.chunks()
        finally:
            handle.cancel()

    def generate_many(self, requests: Iterable[Request]) -> Iterator[tuple[int, Generation]]:
        """Generate for many requests, as many at a time as there are slots; yields (index, generation) as they end.

        A request that is refused or fails ends alone: its generation has the finish reason "error" and the error.
        """
        coming = enumerate(requests)
        running: dict[int, Handle] = {}
        try:
            while True:
                # One request more than slots: the next one starts in the very step after another has ended.
                while len(running) <= self.slots.slots and (each := next(coming, None)) is not None:
                    index, request = each
                    try:
                        running[index] = self.submit(request)
                    except DeployError as error:
                        yield index, Generation("", [], "error", [], Stats(), error=error)
                if not running:
                    return
                self.driver.until(lambda: any(handle.done for handle in running.values()))
                for index in [index for index, handle in running.items() if handle.done]:
                    yield index, running.pop(index).wait()
        finally:
            for handle in running.values():
                handle.cancel()

    def submit(self, request: Request) -> Handle:
        """Queue a request. Its handle yields chunks and the result, and cancels it.

        Raises:
            DeployError: the request is refused; it holds nothing then.
        """
        handle = self.prepare(request)
        self.loop.submit(handle)
        return handle

    def prepare(self, request: Request, *, notify: Callable[[], object] | None = None, since: float | None = None) -> Handle:
        """Encode and check a request. Returns its handle, which ``loop.submit`` queues; until then it holds nothing.

        ``notify``: see :class:`Handle`. ``since``: the monotonic time from which its deadline counts; None: from now.

        Raises:
            DeployError: the request is refused.
        """
        since = time.monotonic() if since is None else since
        ids = self.encode(request)
        manifest = self.manifest
        capacity = manifest.limits.capacity
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}", hint="ask for at least one token")
        if len(ids) + request.max_new_tokens > capacity:
            raise CapacityError(
                f"{len(ids)} prompt tokens + {request.max_new_tokens} new tokens exceed the capacity of {capacity}",
                hint="shorten the prompt, ask for fewer tokens, or export with a larger --capacity",
            )
        if request.deadline is not None and not request.deadline > 0:
            raise UsageError(f"deadline is {request.deadline!r}", hint="a deadline is in seconds from now, and positive")
        request.params.validate(manifest.backbone.vocab_size)
        if request.stop and self.codec is None:
            raise PromptError("stop strings need a tokenizer, and the bundle has no tokenizer", hint="drop stop=…")
        eos = frozenset(() if request.ignore_eos else manifest.text.eos_token_ids)
        output = TextOutput(self.codec, StopChecker(request.stop, include_stop=request.include_stop), eos)
        deepest, grammar = self.executor.abilities.deepest, request.grammar
        guide = None if grammar is None else Guide(self.grammars.matcher(grammar, eos), deepest)
        sequence = Sequence(
            tokens=ids,
            prompt_length=len(ids),
            params=request.params.resolved(),
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=eos,
            drafter=self._drafter(request, ids, guide),
            keep_hidden=request.keep_hidden,
            salt=request.cache_salt,
            top_logprobs=None if request.logprobs is None else int(request.logprobs),
            matcher=guide,
            priority=request.priority,
            deadline=None if request.deadline is None else since + request.deadline,
            since=since,
            cancel=request.cancel,
        )
        return Handle(sequence, output, self.driver, notify)

    def _drafter(self, request: Request, tokens: list[int], guide: Guide | None) -> Drafter:
        """The drafter that the request asks for.

        Greedy requests that leave it open take the bundle's tree where the executor runs ahead: a tree known beforehand needs no
        word from the host between two steps.
        """
        heads, asked = self.manifest.heads, request.drafting
        drafter: Drafter
        deepest = self.executor.abilities.deepest
        if isinstance(asked, Rows):
            rows, greedy = asked.count, request.params.plain_argmax and request.logprobs is None and guide is None
            if rows is None and not asked.lookup and self.executor.abilities.ahead and greedy and not request.keep_hidden:
                return self._drafter_of(self.tree)
            lookup = None if asked.lookup is False else PromptLookup(tokens, deepest, self.grammars.unspaced if guide else None)
            if rows is None and request.params.mode != "typical":  # whose text must not depend on the machine's load
                return self.row_budget.drafter(lookup, on_host=not greedy, guide=guide)
            drafter = BestRows(rows or self.tree.rows, heads.platt_scaling, lookup, guide)
        else:
            drafter = self._drafter_of(asked) if isinstance(asked, Tree) else asked
            if not all(hasattr(drafter, name) for name in ("rows", "heads", "draft")):
                raise UsageError(f"drafting is a {type(asked).__name__}", hint="give Rows(…), a Tree or a drafter")
        if drafter.rows > self.max_rows:
            limit = "bundle allows" if self.max_rows == self.manifest.limits.max_rows else "engine takes"
            raise CapacityError(
                f"a step of {drafter.rows} rows, the {limit} {self.max_rows}",
                hint="use fewer rows or a smaller tree; or export with a larger --max-rows, and build engines with more --rows",
            )
        if isinstance(drafter, (BestRows, AdaptiveDrafter)):
            return drafter
        if not isinstance(drafter, FixedTree):
            drafter = CheckedDrafter(drafter, self.max_rows, deepest, self.manifest.backbone.vocab_size)
        return drafter if guide is None else GuidedDrafter(drafter, guide)

    def _drafter_of(self, tree: Tree) -> FixedTree:
        tree.check_fits(self.manifest.heads.num_heads, self.manifest.heads.top_k)
        return FixedTree(tree)


def request_of(prompt: str | None, speculative: bool, options: dict[str, Any]) -> Request:
    """The request that keyword arguments ask for."""
    known = [*(field.name for field in fields(Request)), "tree", "rows", "lookup", "drafter"]
    unknown = set(options) - set(known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(sorted(unknown))}", hint=f"options: {', '.join(known)}")
    if not flag("speculative", speculative, default=True):
        options["tree"] = ROOT_ONLY
    return Request(prompt=prompt, **options)


def load(
    bundle: Path | str,
    *,
    backend: str = "cpu",
    target: str | None = None,
    slots: int = 1,
    threads: int | None = None,
    variant: str | None = None,
    check_hashes: bool = True,
    prefix_cache: bool = True,
    warm: bool = False,
) -> Session:
    """Load a bundle.

    ``backend``: one of :data:`.backends.BACKENDS`. ``target``: which of the bundle's engines (TensorRT only; None: this GPU's).
    ``slots``: sequences at a time. ``threads``: of the CPU backend; None lets ONNX Runtime take all cores. ``variant``: the graph
    that the CPU backend runs; None takes the CPU variant where the bundle has one. ``check_hashes=False`` checks sizes only;
    engines are hashed before they are loaded in any case. ``prefix_cache=False`` computes every prompt from its first token on;
    otherwise a conversation's next turn, or a shared beginning, starts from the rows that a free slot still holds. ``warm=True``
    (TensorRT only) compiles kernels and captures CUDA graphs of plain steps and of the bundle's tree before it returns.

    Raises:
        UsageError: a backend that doesn't exist, an option that it doesn't take, slots or a variant that the bundle doesn't have.
        BundleError, BundleSchemaError, BundleIntegrityError: the bundle can't be used.
        MissingDependencyError: a package of the backend isn't installed.
        DeviceError, DeviceMemoryError: no usable GPU, or not enough of its memory.
        EngineError, EngineMismatchError: the engine can't be loaded, or wasn't built for this GPU, version or bundle.
    """
    from .backends import BACKENDS, LoadOptions
    from .files.bundle import open_bundle

    bundle = path("bundle", bundle)
    backend = "cpu" if backend is None else backend
    load_backend = BACKENDS.get(backend) if isinstance(backend, str) else None
    if load_backend is None:
        raise UsageError(f"unknown backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    for name, text in (("target", target), ("variant", variant)):
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{name} is {shown(text)}", hint=f"{name} is a string")
    slots = integer("slots", slots, 1, low=-sys.maxsize)
    threads = None if threads is None else integer("threads", threads, 1)
    check_hashes = flag("check_hashes", check_hashes, default=True)
    prefix_cache = flag("prefix_cache", prefix_cache, default=True)
    warm = flag("warm", warm)
    opened = open_bundle(bundle, check_hashes=check_hashes)
    executor = load_backend(opened, LoadOptions(backend, target, slots, threads, variant, warm or None))
    return Session(opened, executor, prefix_cache=prefix_cache)
