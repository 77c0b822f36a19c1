"""Answers with a backbone through transformers: on a GPU before any engine is built for it, on a CPU in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .answers import Answer, Question

_FORWARD_TOKENS = 1 << 15


class TorchAnswerer:
    """Answers ``slots`` prompts at a time on a torch device. ``module``: a transformers causal LM in float32.

    A GPU chooses tokens in half precision. Hidden states of the finished answers are computed in float32 and stored as float16.
    A CPU takes the states as they come while it chooses tokens. ``bfloat16``: the CPU multiplies in that type, two to three times
    as fast as in float32 where it has instructions for it; the module is converted. Samples depend on which prompts are answered
    together: a run that was interrupted goes on with other samples.
    """

    def __init__(
        self, module: Any, weights: str, eos_token_ids: Sequence[int], slots: int, device: str, *, bfloat16: bool = False
    ) -> None:
        cuda = torch.device(device).type == "cuda"
        bfloat16 = bfloat16 and not cuda
        self.weights = f"{weights} bfloat16" if bfloat16 else weights
        self._module = (module.bfloat16() if bfloat16 else module).to(device).eval()
        self._decoding = copy.deepcopy(self._module).half() if cuda else self._module
        self._eos, self._slots, self._device = list(eos_token_ids), slots, device

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[Answer]:
        """Yield the answers, those to short prompts first: prompts of one length need no padding."""
        order = sorted(range(len(questions)), key=lambda index: (questions[index].temperature, len(questions[index].prompt)))
        for temperature, group in groupby(order, key=lambda index: questions[index].temperature):
            indices = list(group)
            for start in range(0, len(indices), self._slots):
                batch = indices[start : start + self._slots]
                prompts = [questions[index].prompt for index in batch]
                with self._last_states() as seen:
                    answers = self._generate(prompts, temperature, questions[batch[0]].seed, max_new_tokens)
                states = self._hidden(prompts, answers) if self._decoding is not self._module else _by_answer(seen, answers)
                for index, tokens, hidden in zip(batch, answers, states, strict=True):
                    yield Answer(index, np.array(tokens, np.int64), hidden)

    def _generate(
        self, prompts: Sequence[Sequence[int]], temperature: float, seed: int, max_new_tokens: int
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        torch.manual_seed(seed)
        chosen: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=self._eos or None, pad_token_id=0, **chosen)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            seen[row, width - len(prompt) :] = 1
        found = self._decoding.generate(
            ids.to(self._device), attention_mask=seen.to(self._device), generation_config=config
        )
        return [self._up_to_end(tokens) for tokens in found[:, width:].tolist()]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        """Cut off the padding behind an answer's end-of-sequence token."""
        ends = [tokens.index(token) for token in self._eos if token in tokens]
        return tokens[: min(ends) + 1] if ends else tokens

    @contextmanager
    def _last_states(self) -> Iterator[list[np.ndarray]]:
        """Collect each decoding pass's states at the last position, float16 [prompts, H]."""
        seen: list[np.ndarray] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            seen.append(output.last_hidden_state[:, -1].half().cpu().numpy())

        hook = self._decoding.base_model.register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def _hidden(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the states that emitted an answer's tokens, float16 [n, H]."""
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        at_once = max(1, _FORWARD_TOKENS // max(map(len, rows)))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)
            # Attention is causal: nothing that counts sees the padding at the end.
            states: Tensor = self._module.base_model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
            half = states.half().cpu().numpy()
            for offset, row in enumerate(part):
                yield half[offset, len(prompts[start + offset]) - 1 : len(row)]


def _by_answer(passes: Sequence[np.ndarray], answers: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Yield each answer's states, float16 [n, H], from those of every pass, [answers, H]."""
    for index, answer in enumerate(answers):
        yield np.stack([states[index] for states in passes[: len(answer)]])
