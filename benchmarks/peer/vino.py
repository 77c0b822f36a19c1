"""openvino-genai."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Answer, Peer, Settings

# As in the library's own sample of prompt lookup.
_LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}


@dataclass(slots=True)
class OpenVino(Peer):
    """Its pipeline for one prompt; its continuous batching for several.

    ``fp32``: cache and arithmetic are, too; otherwise they are as the library chooses for its weights. ``lookup``: it drafts by
    prompt lookup.
    """

    module: ClassVar[str] = "openvino_genai"
    roots: ClassVar[tuple[str, ...]] = ("openvino-genai",)
    fp32: bool = True
    lookup: bool = False
    settings: Settings = field(init=False)
    library: Any = field(init=False)
    pipeline: Any = field(init=False)

    def load(self, settings: Settings) -> None:
        """Load the folder; no blocks of the cache are kept from one prompt to the next."""
        import openvino_genai

        self.library, self.settings = openvino_genai, settings
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads}
        if self.fp32:
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if settings.slots > 1:
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(settings.path, scheduler, "CPU", properties)
            return
        if self.lookup:
            properties["prompt_lookup"] = True
        self.pipeline = openvino_genai.LLMPipeline(settings.path, "CPU", scheduler_config=scheduler, **properties)

    def _config(self, max_new_tokens: int) -> Any:
        config, eos = self.library.GenerationConfig(), self.settings.eos_token_ids
        config.do_sample, config.max_new_tokens, config.apply_chat_template = False, max_new_tokens, False
        config.eos_token_id, config.stop_token_ids = eos[0], set(eos)
        if self.settings.ignore_eos:
            config.ignore_eos, config.stop_token_ids = True, set()
        if self.lookup:
            for name, value in _LOOKUP.items():
                setattr(config, name, value)
        return config

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate from ids; the library tells the time to the first token."""
        import numpy as np
        import openvino

        ids = np.array([token_ids], np.int64)
        inputs = self.library.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        result = self.pipeline.generate(inputs, self._config(max_new_tokens))
        metrics = result.perf_metrics
        steps = len(metrics.raw_metrics.m_batch_sizes) - 1 if self.lookup else None
        return Answer([int(token) for token in result.tokens[0]], metrics.get_ttft().mean / 1000, steps)

    def run_many(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Queue a prompt for each slot, and another one whenever an answer has ended.

        The scheduler itself takes all that are queued: ``max_num_seqs`` of 4 and 8 made no difference to 16 of them.
        """
        import numpy as np
        import openvino

        handles: list[Any] = []
        running: list[Any] = []
        while running or len(handles) < len(prompts):
            while len(running) < self.settings.slots and len(handles) < len(prompts):
                prompt = openvino.Tensor(np.array([prompts[len(handles)]], np.int64))
                handles.append(self.pipeline.add_request(len(handles), prompt, self._config(max_new_tokens)))
                running.append(handles[-1])
            self.pipeline.step()
            running = [handle for handle in running if handle.get_status() == self.library.GenerationStatus.RUNNING]
        return [[int(token) for token in handle.read_all()[0].generated_ids] for handle in handles]
