"""transformers' own greedy decoding of a checkpoint. Shares the reading of weights with a bundle, and shows its other errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import quiet_libraries, require

# A bundle's names of types, and export's.
_DTYPES = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Reference:
    """A loaded transformers model; ``facts`` name it."""

    module: Any
    facts: dict[str, Any]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy tokens after ``prompt``, past end-of-sequence tokens."""
        import torch

        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = self.module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [V] after ``tokens``, float32, from one pass over all of them."""
        import torch

        with torch.inference_mode():
            output = self.module(torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1).logits[0, -1]
        logits: np.ndarray = output.float().numpy()
        return logits


def load_reference(source: Path | str, dtype: str, report: Callable[[str], object] = lambda _phase: None) -> Reference:
    """Load a model folder, a GGUF file, or a model of a hub by its name, with transformers in the bundle's dtype.

    ``report`` is told what is fetched.

    Raises:
        DownloadError: a name on a hub that can't be fetched.
        MissingDependencyError: transformers or torch isn't installed.
        CheckpointError: no such model, one that can't be read, or one that its folder contradicts.
    """
    require("export")
    quiet_libraries()
    import torch
    import transformers

    from ...export.backbone.backbone import load_module
    from ...export.hub import fetch_model

    fetched = fetch_model(source, report)
    module = load_module(fetched.path, _DTYPES[dtype])
    # A checkpoint's own settings may penalise repetition or stop early; greedy means the argmax, to the length asked for.
    module.generation_config = transformers.GenerationConfig(pad_token_id=0)
    name = fetched.path.name if fetched.origin is None else str(source)
    facts = {"model": name, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    return Reference(module, facts)
