"""llama.cpp through llama-cpp-python."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Answer, Peer, Settings

# llama-cpp-python's advice for processors; its default of 10 is for GPUs.
_LOOKUP_TOKENS = 2
_BATCH_TOKENS = 2048  # of one call, as llama.cpp's server


@dataclass(slots=True)
class LlamaCpp(Peer):
    """llama.cpp, from a GGUF file. ``lookup``: it drafts by prompt lookup.

    Its cache is fp16, its default, unless ``f32_cache``.
    """

    module: ClassVar[str] = "llama_cpp"
    roots: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    f32_cache: bool = False
    lookup: bool = False
    drafted: int = 0  # times that it drafted: once before every call but the prompt's
    settings: Settings = field(init=False)
    model: Any = field(init=False)

    def load(self, settings: Settings) -> None:
        """Load the file."""
        self.settings = settings
        self.model = _Parallel(settings, self.f32_cache) if settings.slots > 1 else self._one(settings)

    def _one(self, settings: Settings) -> Any:
        from llama_cpp import GGML_TYPE_F32, Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        options: dict[str, Any] = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if self.f32_cache else {}
        if self.lookup:
            lookup = LlamaPromptLookupDecoding(num_pred_tokens=_LOOKUP_TOKENS)

            def counted(input_ids: Any, /, **more: Any) -> Any:
                self.drafted += 1
                return lookup(input_ids, **more)

            options |= {"draft_model": counted, "logits_all": True}
        threads = settings.threads
        return Llama(settings.path, n_ctx=settings.capacity, n_threads=threads, n_threads_batch=threads, verbose=False, **options)

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate with the cache emptied first: it would reuse the prefix that chat prompts share."""
        self.model.reset()
        drafted_before = self.drafted
        started, first, tokens = time.perf_counter(), None, []
        for token in self.model.generate(token_ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(int(token))
            first = first or time.perf_counter() - started
            if len(tokens) == max_new_tokens or token in self.settings.stops:
                break
        return Answer(tokens, first, self.drafted - drafted_before if self.lookup else None)

    def run_many(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Answer by one batch a step: the newest token of every answer, and prompts that start."""
        return self.model.run(prompts, max_new_tokens)


@dataclass(slots=True)
class _Answering:
    """A prompt in a sequence of the cache. ``pending``: tokens that the cache doesn't hold yet."""

    prompt: int
    pending: list[int]
    position: int = 0


class _Parallel:
    """A context of several sequences, filled as llama.cpp's server fills its slots."""

    def __init__(self, settings: Settings, f32_cache: bool) -> None:
        import llama_cpp

        self.library, self.settings = llama_cpp, settings
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(settings.path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"{settings.path}: llama.cpp can't load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = settings.capacity * settings.slots, settings.slots
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = settings.threads
        if f32_cache:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {settings.slots} sequences")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        library = self.library
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = list(enumerate(prompts))[::-1]
        running: dict[int, _Answering] = {}
        memory = library.llama_get_memory(self.context)
        library.llama_memory_clear(memory, True)
        batch = library.llama_batch_init(_BATCH_TOKENS, 0, 1)
        try:
            while waiting or running:
                for sequence in range(self.settings.slots):
                    if sequence not in running and waiting:
                        prompt, tokens = waiting.pop()
                        running[sequence] = _Answering(prompt, list(tokens))
                for sequence, token in self._step(batch, running).items():
                    answer = answers[running[sequence].prompt]
                    answer.append(token)
                    running[sequence].pending = [token]
                    if len(answer) == max_new_tokens or token in self.settings.stops:
                        library.llama_memory_seq_rm(memory, sequence, -1, -1)
                        del running[sequence]
        finally:
            library.llama_batch_free(batch)
        return answers

    def _step(self, batch: Any, running: dict[int, _Answering]) -> dict[int, int]:
        """Compute what is pending, as far as the batch has room; answers that go on come first. Returns each one's next token."""
        import numpy as np

        batch.n_tokens = 0
        rows: dict[int, int] = {}
        for sequence, answering in sorted(running.items(), key=lambda item: len(item[1].pending)):
            part = answering.pending[: _BATCH_TOKENS - batch.n_tokens]
            for token in part:
                row = batch.n_tokens
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, answering.position, 1
                batch.seq_id[row][0], batch.logits[row] = sequence, 0
                answering.position += 1
                batch.n_tokens += 1
            answering.pending = answering.pending[len(part) :]
            if part and not answering.pending:
                rows[sequence] = batch.n_tokens - 1
                batch.logits[rows[sequence]] = 1
        if status := self.library.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode ended with status {status}")
        logits = {sequence: self.library.llama_get_logits_ith(self.context, row) for sequence, row in rows.items()}
        return {sequence: int(np.ctypeslib.as_array(found, (self.vocab,)).argmax()) for sequence, found in logits.items()}
