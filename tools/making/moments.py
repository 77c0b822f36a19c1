"""Measures what GPTQ rounds a bundle's 4-bit weights with, on prompts that the bundle answers or on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ...runtime.files.bundle import Bundle
    from ..console import Progress

MOMENT_PROMPTS, MOMENT_TOKENS = 48, 48


def measure_moments(
    bundle: Bundle, data: Path | None, samples: int | None, threads: int | None, bar: Progress
) -> tuple[dict[str, list[np.ndarray]], str]:
    """Measure E[xᵀx] by the names of weights, on ``samples`` (None: 48) samples of ``data``. Returns them and the texts' hash.

    Prompts (None: of the package's training file) are answered first, in 48 tokens each. Plain text is only read: large models
    need minutes for an answer.

    Raises:
        CalibrationError, PromptError: the data won't do.
    """
    from ...calibration.int8.collect import Calibrator
    from ...calibration.int8.moments import collect_moments
    from ...calibration.int8.samples import JSON_LINES, read_samples
    from ...runtime.session import load
    from ...runtime.text.prompts import prompts_digest
    from ..prompt_source import check_room, packaged_prompts

    source = data or packaged_prompts("train")
    answered = source.suffix.lower() in JSON_LINES
    samples = MOMENT_PROMPTS if samples is None else samples
    bar.phase("answers for GPTQ" if answered else "texts for GPTQ", samples)
    if answered:
        session = load(bundle.folder, threads=threads, check_hashes=False, prefix_cache=False)
        texts = read_samples(session, source, samples, MOMENT_TOKENS + 1)
        check_room(session, texts, MOMENT_TOKENS + 1)
        for done, prompt in enumerate(texts):
            texts[done] = [*prompt, *session.generate(token_ids=prompt, max_new_tokens=MOMENT_TOKENS).token_ids]
            bar.update(done + 1)
        del session  # frees its weights before the calibrator loads its own
        calibrator = Calibrator(bundle, threads)
    else:
        calibrator = Calibrator(bundle, threads)
        texts = read_samples(calibrator.session, source, samples, 1)
    bar.phase("second moments", len(texts))
    return collect_moments(calibrator, texts, bar.update), prompts_digest(texts)
