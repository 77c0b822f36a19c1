"""Answers with a backbone through transformers: a GPU can do that before any engine is built for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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
    Samples depend on which prompts are answered together: a run that was interrupted goes on with other samples.
    """

    def __init__(self, module: Any, weights: str, eos_token_ids: Sequence[int], slots: int, device: str) -> None:
        self.weights = weights
        self._module = module.to(device).eval()
        self._decoding = copy.deepcopy(self._module).half() if torch.device(device).type == "cuda" else self._module
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
                answers = self._generate(prompts, temperature, questions[batch[0]].seed, max_new_tokens)
                for index, tokens, hidden in zip(batch, answers, self._hidden(prompts, answers), strict=True):
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
