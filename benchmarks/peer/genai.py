"""onnxruntime-genai, from the folder that its model builder wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Answer, Peer, Settings

_NGRAM = 3  # tokens that prompt lookup compares; the library's own number of drafted tokens is 4


@dataclass(slots=True)
class OrtGenai(Peer):
    """A generator for one prompt, ``lookup`` with prompt lookup; its engine for several.

    The engine of 0.18 batches continuously on CUDA alone. On the CPU it takes a batch of requests and pads them. The next batch
    starts when all of them have ended.
    """

    module: ClassVar[str] = "onnxruntime_genai"
    roots: ClassVar[tuple[str, ...]] = ("onnxruntime-genai",)
    lookup: bool = False
    settings: Settings = field(init=False)
    library: Any = field(init=False)
    model: Any = field(init=False)
    engine: Any = field(init=False)

    def load(self, settings: Settings) -> None:
        """Load the folder."""
        import onnxruntime_genai

        self.library, self.settings = onnxruntime_genai, settings
        config = onnxruntime_genai.Config(settings.path)
        options = {"intra_op_num_threads": settings.threads}
        overlay: dict[str, Any] = {"model": {"decoder": {"session_options": options}, "eos_token_id": settings.eos_token_ids}}
        if settings.slots > 1:
            overlay["engine"] = {"static_batching": {"max_batch_size": settings.slots}}
            overlay["search"] = {"max_length": settings.capacity}
        config.overlay(json.dumps(overlay))
        self.model = onnxruntime_genai.Model(config)
        self.engine = onnxruntime_genai.Engine(self.model) if settings.slots > 1 else None

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate with a generator of its own."""
        started, first, tokens = time.perf_counter(), None, []
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=len(token_ids) + max_new_tokens)
        if self.lookup:
            params.set_speculative_options(ngram_size=_NGRAM)
        generator = self.library.Generator(self.model, params)
        generator.append_tokens(token_ids)
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter() - started
        passes = generator.get_speculative_stats() if self.lookup else None
        steps = None if passes is None else passes["standard_fallback_steps"] + passes["target_forward_passes"]
        return Answer(tokens, first, steps)

    def run_many(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Queue all prompts; the engine takes as many as there are slots."""
        import numpy as np

        answers: list[list[int]] = [[] for _ in prompts]
        requests = {}
        for index, prompt in enumerate(prompts):
            request = self.engine.create_request()
            options = self.library.TurnOptions(request)
            options.set_do_sample(False)
            options.set_max_generated_tokens(max_new_tokens)
            if self.settings.ignore_eos:
                options.set_min_generated_tokens(max_new_tokens)
            request.begin_turn(np.array(prompt, np.int32), options)
            requests[request] = index
        events = self.engine.create_event_buffer(max(64, 2 * self.settings.slots))
        while self.engine.has_pending_requests():
            for event in self.engine.run(events):
                if event.error_code != self.library.EngineErrorCode.NONE:
                    raise ValueError(f"the engine failed: {event.error_code.name}")
                if event.token is not None:
                    answers[requests[event.request]].append(int(event.token))
                elif event.finish_reason == self.library.FinishReason.EOS:  # which the engine keeps to itself
                    answers[requests[event.request]].append(self.settings.eos_token_ids[0])
        for request in requests:
            request.close()
        return answers
