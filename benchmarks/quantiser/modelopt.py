"""Measures one method of nvidia-modelopt on a Hugging Face folder, fake-quantised by torch on the CPU.

Usage: ``python -m quantiser.modelopt JUDGE_FOLDER MODEL CONFIG [--block N] [--keep PATTERN,…] [--texts N]``

Runs in an environment of its own: nvidia-modelopt, requests (which it needs and does not ask for), transformers, torch, numpy.
PYTHONPATH has to name this repository's ``benchmarks`` and ``src``. The last line of stdout is the report.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantiser.judge import Judge


def configured(base: dict[str, Any], block: int | None, keep: list[str]) -> dict[str, Any]:
    """Change a configuration of the library: the size of the weights' blocks, and layers that stay as they are."""
    config = copy.deepcopy(base)
    for entry in config["quant_cfg"]:
        sizes = (entry.get("cfg") or {}).get("block_sizes")
        if sizes is not None and block is not None:
            sizes[-1 if -1 in sizes else "-1"] = block
    config["quant_cfg"] += [{"quantizer_name": f"*{pattern}*", "enable": False} for pattern in keep]
    return config


def measure(folder: Path, model_folder: Path, name: str, block: int | None, keep: list[str], texts: int | None) -> dict[str, Any]:
    """Quantise with the judge's first calibration texts (None: all), then judge."""
    import modelopt
    import modelopt.torch.quantization as mtq
    import torch
    import transformers

    judge = Judge.read(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(prompt: list[int], answer: list[int]) -> np.ndarray:
        found = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False, logits_to_keep=len(answer)).logits
        result: np.ndarray = found[0].float().numpy()
        return result

    def forward(_model: Any) -> None:
        for text in judge.calibration[:texts]:
            logits(*text)

    started = time.perf_counter()
    if name != "none":
        model = mtq.quantize(model, configured(getattr(mtq, name), block, keep), forward)
    seconds = time.perf_counter() - started
    quantisers = [module for part, module in model.named_modules() if part.endswith("weight_quantizer")]
    return {
        **judge.of(logits),
        "products": sum(bool(module.is_enabled) for module in quantisers),
        "seconds": seconds,
        "versions": {module.__name__: module.__version__ for module in (modelopt, torch, transformers)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for argument in ("folder", "model"):
        parser.add_argument(argument, type=Path)
    parser.add_argument("config")
    parser.add_argument("--block", type=int)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--keep", type=lambda text: text.split(","), default=[])
    args = parser.parse_args()
    print(json.dumps(measure(args.folder, args.model, args.config, args.block, args.keep, args.texts)))
