"""transformers' own greedy decoding of a checkpoint. It shares no code with a bundle, so it shows a bundle's errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import quiet_libraries, require


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


def load_reference(source: Path, dtype: str) -> Reference:
    """Load a model folder (or a GGUF file) with transformers in the bundle's dtype.

    Raises:
        MissingDependencyError: transformers or torch isn't installed.
        CheckpointError: no such model, or transformers can't load it.
    """
    require("export")
    quiet_libraries()
    import torch
    import transformers

    from ...runtime.errors import CheckpointError

    folder, options = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, **options
        )
    except Exception as error:  # transformers raises whatever its readers raise
        raise CheckpointError(
            f"transformers can't load {source}: {type(error).__name__}",
            hint="give the checkpoint that the bundle was exported from",
        ) from error
    module.eval()
    # A checkpoint's own settings may penalise repetition or stop early; greedy means the argmax, to the length asked for.
    module.generation_config = transformers.GenerationConfig(pad_token_id=0)
    facts = {"model": source.name, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    return Reference(module, facts)
