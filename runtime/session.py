"""What an application embeds: load a bundle, generate or stream text, many sequences at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from .backends import BACKENDS, LoadOptions
from .drafting.draft import BestRows, Drafter, FixedTree
from .drafting.lookup import PromptLookup
from .drafting.row_budget import SIZES, RightSize
from .errors import CapacityError, PromptError, UsageError
from .executors.executor import AheadExecutor, Executor
from .files.bundle import Bundle, open_bundle
from .loop.decode import Decoder
from .loop.sequence import Sequence
from .loop.slots import SlotPool
from .request import Chunk, Generation, Message, Request, Run
from .text.encoder import PromptEncoder
from .text.stops import StopChecker
from .tree import ROOT_ONLY

__all__ = ["Chunk", "Generation", "Message", "Request", "Session", "load"]


class Session:
    """A loaded bundle. One engine, ``slots`` sequences at a time; calls from several threads take turns step by step."""

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor,
        slots: int,
        *,
        drafts: bool = True,
        step_rows: tuple[int, ...] | None = None,
        deepest: int | None = None,
    ) -> None:
        """``drafts``: whether the executor can verify trees; plain decoding is all there is otherwise.

        ``step_rows``: the numbers of rows that the executor's steps have, ascending; others are padded to the next larger one
        (None: any, up to the bundle's limit). ``deepest``: drafted tokens that a step can accept (None: as many as heads).
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.executor = executor
        limits = self.manifest.limits
        self.encoder = PromptEncoder(self.manifest.text, self.manifest.backbone.vocab_size, bundle.path)
        self.slots = SlotPool(slots, limits.capacity)
        self.tree = self.manifest.tree() if drafts else ROOT_ONLY
        self._drafts = drafts
        self.max_rows = limits.max_rows if step_rows is None else min(step_rows[-1], limits.max_rows)
        heads = self.manifest.heads
        self._deepest = deepest or heads.num_heads
        sizes = tuple(rows for rows in (1, *(step_rows or SIZES)) if rows <= self.max_rows)
        self._right_size = RightSize(tuple(sorted(set(sizes))), heads.num_heads, heads.platt_scaling)
        self._decoder = Decoder(executor, self.slots, heads.num_heads, limits.prefill_chunk, self._right_size)
        self._lock = threading.RLock()  # a stream may be closed by the garbage collector, in the middle of anything

    # -- text ------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Any:
        """The bundle's tokenizer (:class:`.tokenizer.TextCodec`), or None when it speaks token ids only."""
        return self.encoder.codec

    def encode(self, request: Request) -> list[int]:
        """The request's prompt as token ids; see :meth:`.encoder.PromptEncoder.encode`."""
        return self.encoder.encode(request)

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> Generation:
        """Generate to the end. ``options`` are the fields of :class:`Request`; ``speculative=False`` decodes plainly."""
        chunks = self._start(_request(prompt, speculative, options))
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                generation: Generation = end.value
                return generation

    def stream(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> Iterator[Chunk]:
        """Generate step by step. Closing the iterator cancels the generation and frees its slot."""
        return self._start(_request(prompt, speculative, options))

    def generate_many(self, requests: Iterable[Request]) -> Iterator[tuple[int, Generation]]:
        """Generate for many requests, as many at a time as there are slots; yields (index, generation) as they finish."""
        waiting = deque(enumerate(requests))
        running: dict[int, Run] = {}
        try:
            while waiting or running:
                # Without a slot of its own to wait for, acquiring one from a full pool is an error, not a wait.
                while waiting and (self.slots.free or not running):
                    index, request = waiting.popleft()
                    running[index] = run = self._open(request)
                    with self._lock:
                        first = self._decoder.prefill(run.sequence)
                    run.take(first)
                active = [run for run in running.values() if run.goes_on()]
                if active:
                    with self._lock:
                        emitted = self._decoder.step([run.sequence for run in active])
                    for run, tokens in zip(active, emitted, strict=True):
                        run.take(tokens)
                for index in [index for index, run in running.items() if run.sequence.finish_reason is not None]:
                    run = running.pop(index)
                    self._release(run.sequence)
                    yield index, run.generation()
        finally:
            for run in running.values():
                self._release(run.sequence)

    def _start(self, request: Request) -> Generator[Chunk, None, Generation]:
        run = self._open(request)
        sequence = run.sequence
        try:
            with self._lock:
                emitted = self._decoder.prefill(sequence)
            yield run.take(emitted)
            while run.goes_on():
                with self._lock:
                    (emitted,) = self._decoder.step([sequence])
                yield run.take(emitted)
            yield run.last_chunk()
            return run.generation()
        finally:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        with self._lock:
            self._decoder.release(sequence)

    def _open(self, request: Request) -> Run:
        ids = self.encode(request)
        manifest = self.manifest
        capacity = manifest.limits.capacity
        if not isinstance(request.max_new_tokens, int) or request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}", hint="ask for at least one token")
        if len(ids) + request.max_new_tokens > capacity:
            raise CapacityError(
                f"{len(ids)} prompt tokens + {request.max_new_tokens} new tokens exceed the capacity of {capacity}",
                hint="shorten the prompt, ask for fewer tokens, or export with a larger --capacity",
            )
        request.params.validate(manifest.backbone.vocab_size)
        drafter = self._drafter(request, ids)
        if request.stop and self.codec is None:
            raise PromptError("stop strings need a tokenizer, and the bundle has no tokenizer", hint="drop stop=…")
        stops = StopChecker(request.stop, include_stop=request.include_stop)
        decoder = self.codec.decoder() if self.codec is not None else None
        eos = frozenset(() if request.ignore_eos else manifest.text.eos_token_ids)
        # Last, so that a refused request holds no slot.
        sequence = Sequence(
            slot=self.slots.acquire(),
            tokens=ids,
            prompt_length=len(ids),
            params=request.params.resolved(),
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=eos,
            drafter=drafter,
            keep_hidden=request.keep_hidden,
        )
        return Run(sequence, decoder, stops, request.cancel)

    def _drafter(self, request: Request, tokens: list[int]) -> Drafter:
        """What the request's steps verify: its tree, as many rows as it asks for, or as many as pay in each step.

        Greedy requests that leave it open take the bundle's tree where the executor runs ahead: a tree known beforehand needs no
        word from the host between two steps.
        """
        drafter: Drafter
        if request.tree is not None and request.rows is not None:
            raise UsageError(f"got a tree and {request.rows} rows", hint="give one of them: a tree has its own number")
        given = [name for name in ("tree", "rows", "lookup") if getattr(request, name) is not None]
        if request.drafter is not None and given:
            raise UsageError(f"got a drafter and {', '.join(given)}", hint="a drafter chooses the rows: leave the others out")
        if request.tree is not None and request.lookup:
            raise UsageError("got a tree and lookup=True", hint="a tree's rows come from the heads alone: leave one of them out")
        open_choice = request.tree is None and request.rows is None and not request.lookup
        alone = isinstance(self.executor, AheadExecutor) and request.params.plain_argmax and not request.keep_hidden
        if request.drafter is not None:
            drafter = request.drafter
        elif request.tree is not None or (open_choice and alone):
            tree = self.tree if request.tree is None else request.tree
            tree.check_fits(self.manifest.heads.num_heads, self.manifest.heads.top_k)
            drafter = FixedTree(tree)
        else:
            rows = request.rows
            if rows is not None and (not isinstance(rows, int) or rows < 1):
                raise UsageError(f"rows is {rows}", hint="at least 1: the root")
            lookup = None if request.lookup is False else PromptLookup(tokens, self._deepest)
            lossy = request.params.mode == "typical"  # its text depends on what is drafted, and must not on the machine's load
            if rows is None and self._drafts and not lossy:
                with self._lock:
                    return self._right_size.drafter(lookup, on_host=not request.params.plain_argmax)
            drafter = BestRows(rows or self.tree.rows, self.manifest.heads.platt_scaling, lookup)
        if drafter.rows > 1 and not self._drafts:
            raise UsageError(
                f"the variant 'cpu' can't verify trees of {self.slots.slots} slots",
                hint="load the variant 'standard', or decode plainly",
            )
        if drafter.rows > self.max_rows:
            limit = "bundle allows" if self.max_rows == self.manifest.limits.max_rows else "engine takes"
            raise CapacityError(
                f"a step of {drafter.rows} rows, the {limit} {self.max_rows}",
                hint="use fewer rows or a smaller tree; or export with a larger --max-rows, and build engines with more --rows",
            )
        return drafter


def _request(prompt: str | None, speculative: bool, options: dict[str, Any]) -> Request:
    unknown = set(options) - set(Request.__dataclass_fields__)
    if unknown:
        known = ", ".join(Request.__dataclass_fields__)
        raise UsageError(f"unknown option {', '.join(sorted(unknown))}", hint=f"options: {known}")
    if not speculative:
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
) -> Session:
    """Load a bundle.

    ``backend``: one of :data:`.backends.BACKENDS`. ``target``: which of the bundle's engines (TensorRT only; None: this GPU's).
    ``slots``: sequences at a time. ``threads``: of the CPU backend; None lets ONNX Runtime take all cores. ``variant``: which
    graph the CPU backend runs; None takes the CPU variant for one slot and the standard graph for more: with several slots the
    CPU variant is faster but only decodes plainly, because its fused attention can't verify trees of several slots at once.
    ``check_hashes=False`` checks sizes only; engines are hashed before they are loaded in any case.

    Raises:
        UsageError: a backend that doesn't exist, an option that it doesn't take, slots or a variant that the bundle doesn't have.
        BundleError, BundleSchemaError, BundleIntegrityError: the bundle can't be used.
        MissingDependencyError: a package of the backend isn't installed.
        DeviceError, DeviceMemoryError: no usable GPU, or not enough of its memory.
        EngineError, EngineMismatchError: the engine can't be loaded, or wasn't built for this GPU, version or bundle.
    """
    load_backend = BACKENDS.get(backend)
    if load_backend is None:
        raise UsageError(f"unknown backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    opened = open_bundle(bundle, check_hashes=check_hashes)
    limits = opened.manifest.limits
    if not 1 <= slots <= limits.batch:
        raise UsageError(f"{slots} slots, the bundle allows 1 to {limits.batch}", hint=f"export with --batch {max(slots, 1)}")
    loaded = load_backend(opened, LoadOptions(backend, target, slots, threads, variant))
    return Session(opened, loaded.executor, slots, drafts=loaded.drafts, step_rows=loaded.step_rows, deepest=loaded.deepest)
