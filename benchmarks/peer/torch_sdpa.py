"""transformers with torch's scaled-dot-product attention."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Answer, Peer, Settings

_LOOKUP_TOKENS = 10  # as in the paper whose method it is


@dataclass(slots=True)
class Transformers(Peer):
    """The model in fp32, with the default cache. ``lookup``: it drafts by prompt lookup."""

    module: ClassVar[str] = "transformers"
    roots: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    lookup: bool = False
    passes: int = 0  # forward passes so far
    settings: Settings = field(init=False)
    torch: Any = field(init=False)
    model: Any = field(init=False)

    def load(self, settings: Settings) -> None:
        """Load the folder in fp32."""
        import torch
        import transformers

        torch.set_num_threads(settings.threads)
        self.torch, self.settings = torch, settings
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.register_forward_pre_hook(self._count)

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate, and note when the first token came."""
        clock = _FirstToken()
        started = time.perf_counter()
        ids = self.torch.tensor([token_ids])
        before = self.passes
        output = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.settings.eos_token_ids,
            pad_token_id=self.settings.eos_token_ids[0],
            streamer=clock,
            **({"prompt_lookup_num_tokens": _LOOKUP_TOKENS} if self.lookup else {}),
        )
        steps = self.passes - before - 1 if self.lookup else None
        return Answer(output[0, len(token_ids) :].tolist(), clock.at - started, steps)

    def _count(self, *_: object) -> None:
        self.passes += 1


class _FirstToken:
    """A streamer that notes when the first token came; the first thing put is the prompt."""

    def __init__(self) -> None:
        self.puts, self.at = 0, 0.0

    def put(self, _: object) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass
