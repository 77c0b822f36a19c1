"""Makes self-distillation data: the backbone's own answers, with the hidden state behind every token.

Labels from the model's own answers work best for heads on a frozen backbone (arXiv 2401.10774, section 2.2.2). The runtime
answers many prompts at a time, and hidden states come out of the same engine calls. :mod:`.torch_answerer` does the same on a
GPU. A run that was interrupted goes on after the last shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ...runtime.sampling import SamplingParams
from ...runtime.session import Request, Session
from ...runtime.text.prompts import prompts_digest
from .answers import Answer, Answerer, AnswerFolder, DataDescription, Question

GREEDY = (0.0,)


class RuntimeAnswerer:
    """Answers with a session, as many prompts at a time as it has slots."""

    def __init__(self, session: Session) -> None:
        self._session = session
        files = session.manifest.files.items()
        linked = sorted(record.sha256 for name, record in files if name.endswith(".safetensors"))
        copied = next(record.sha256 for name, record in files if name.endswith("weights.bin"))
        self.weights = hashlib.sha256("".join(linked).encode()).hexdigest() if linked else copied

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[Answer]:
        """Yield the answers as they are finished. Each is chosen with its question's own seed."""
        requests = [_request(question, max_new_tokens) for question in questions]
        for index, generation in self._session.generate_many(requests):
            assert generation.hidden is not None
            yield Answer(index, np.asarray(generation.token_ids, np.int64), generation.hidden.astype(np.float16))


def distill(
    answerer: Answerer,
    prompts: Sequence[Sequence[int]],
    output: Path,
    *,
    max_new_tokens: int = 384,
    temperatures: Sequence[float] = GREEDY,
    seed: int = 0,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> int:
    """Answer ``prompts`` (token ids) into ``output``, once for each temperature. Returns the number of tokens there.

    Question t · len(prompts) + p is prompt p at temperature t. ``progress(done, total, tokens)`` is called before the
    first answer and after each.

    Raises:
        TrainingError: ``output`` holds data made otherwise.
    """
    description = DataDescription(
        prompts_digest(prompts), len(prompts), answerer.weights, max_new_tokens, tuple(temperatures), seed
    )
    folder = AnswerFolder(output, description)
    pairs = [(prompt, temperature) for temperature in temperatures for prompt in prompts]
    questions = [Question(*pair, seed + index) for index, pair in enumerate(pairs)]
    waiting = [index for index in range(len(questions)) if index not in folder.answered]
    progress(len(folder.answered), len(questions), folder.tokens)
    for answer in answerer.answer([questions[index] for index in waiting], max_new_tokens):
        folder.add(Answer(waiting[answer.question], answer.tokens, answer.hidden))
        progress(len(folder.answered), len(questions), folder.tokens)
    folder.flush()
    return folder.tokens


def _request(question: Question, max_new_tokens: int) -> Request:
    greedy = question.temperature == 0
    params = SamplingParams() if greedy else SamplingParams("sample", temperature=question.temperature, seed=question.seed)
    return Request(token_ids=question.prompt, max_new_tokens=max_new_tokens, params=params, keep_hidden=True)
