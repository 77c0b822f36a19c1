"""Lists known model sizes as data: shapes from the models' public configs, with limits and rows to start from.

Limits and rows are chosen by size and not measured; ``bench`` on the target machine decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.errors import UsageError
from ...runtime.files.backbone import BackboneShape


@dataclass(frozen=True, slots=True)
class ModelShape(BackboneShape):
    """Adds to a backbone's sizes what its weights and positions depend on: a decoder with gated MLPs and RMS norms.

    ``max_position``: the trained positions. A sliding window limits nothing: caches hold what lies behind it, too.
    ``tied``: the vocabulary projection is the embedding. ``qkv_bias``: queries, keys and values have biases.
    """

    intermediate_size: int
    max_position: int
    tied: bool = False
    qkv_bias: bool = False


@dataclass(frozen=True, slots=True)
class Preset:
    """A size that ``plan --size`` knows. ``parameters``: the published count.

    A plan starts with ``capacity``, ``rows`` (sizes of a step, each a profile of its engine) and ``prefill_chunk``.
    """

    name: str
    aliases: tuple[str, ...]
    checkpoint: str
    parameters: int
    shape: ModelShape
    capacity: int
    rows: tuple[int, ...]
    prefill_chunk: int

    @property
    def config(self) -> str:
        """Name of its config class in transformers."""
        return f"{self.shape.architecture.removesuffix('ForCausalLM')}Config"

    def report(self) -> dict[str, object]:
        """Return the facts that ``plan --list --json`` prints."""
        shape = self.shape
        sizes = {
            "layers": shape.layers,
            "hidden": shape.hidden_size,
            "intermediate": shape.intermediate_size,
            "heads": shape.attention_heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab": shape.vocab_size,
            "max_position": shape.max_position,
            "tied": shape.tied,
            "qkv_bias": shape.qkv_bias,
        }
        return {
            "name": self.name,
            "aliases": self.aliases,
            "config": self.config,
            "checkpoint": self.checkpoint,
            "parameters": self.parameters,
            "shape": sizes,
            "capacity": self.capacity,
            "rows": self.rows,
            "prefill_chunk": self.prefill_chunk,
        }


_LLAMA, _QWEN2, _MISTRAL = "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"
# Rows of the steps, and the prefill chunk, of models below and above 5·10⁹ parameters.
EDGE = ((1, 4, 8, 16), 256)
LARGE = ((1, 8, 16, 32, 64), 512)


#                                    L   H     heads kv  D   V      I      positions
_SMOL_135M = ModelShape(_LLAMA, 30, 576, 9, 3, 64, 49152, 1536, 8192, tied=True)
_SMOL_360M = ModelShape(_LLAMA, 32, 960, 15, 5, 64, 49152, 2560, 8192, tied=True)
_SMOL_1700M = ModelShape(_LLAMA, 24, 2048, 32, 32, 64, 49152, 8192, 8192, tied=True)
_QWEN_500M = ModelShape(_QWEN2, 24, 896, 14, 2, 64, 151936, 4864, 32768, tied=True, qkv_bias=True)
_QWEN_1500M = ModelShape(_QWEN2, 28, 1536, 12, 2, 128, 151936, 8960, 32768, tied=True, qkv_bias=True)
_QWEN_3B = ModelShape(_QWEN2, 36, 2048, 16, 2, 128, 151936, 11008, 32768, tied=True, qkv_bias=True)
_LLAMA_1B = ModelShape(_LLAMA, 16, 2048, 32, 8, 64, 128256, 8192, 131072, tied=True)
_LLAMA_3B = ModelShape(_LLAMA, 28, 3072, 24, 8, 128, 128256, 8192, 131072, tied=True)
_VICUNA_7B = ModelShape(_LLAMA, 32, 4096, 32, 32, 128, 32000, 11008, 4096)
_ZEPHYR_7B = ModelShape(_MISTRAL, 32, 4096, 32, 8, 128, 32000, 14336, 32768)
_LLAMA_8B = ModelShape(_LLAMA, 32, 4096, 32, 8, 128, 128256, 14336, 131072)
_VICUNA_13B = ModelShape(_LLAMA, 40, 5120, 40, 40, 128, 32000, 13824, 4096)
_VICUNA_33B = ModelShape(_LLAMA, 60, 6656, 52, 52, 128, 32000, 17920, 2048)

PRESETS = (
    Preset(
        "smollm2-135m", ("135m", "0.1b"), "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, _SMOL_135M, 2048, *EDGE
    ),
    Preset("smollm2-360m", ("360m",), "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, _SMOL_360M, 2048, *EDGE),
    Preset("qwen2.5-0.5b", ("0.5b",), "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, _QWEN_500M, 2048, *EDGE),
    Preset("llama-3.2-1b", ("1b",), "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, _LLAMA_1B, 4096, *EDGE),
    Preset("qwen2.5-1.5b", ("1.5b",), "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, _QWEN_1500M, 4096, *EDGE),
    Preset("smollm2-1.7b", ("1.7b",), "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, _SMOL_1700M, 2048, *EDGE),
    Preset("qwen2.5-3b", (), "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, _QWEN_3B, 4096, *EDGE),
    Preset("llama-3.2-3b", (), "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, _LLAMA_3B, 4096, *EDGE),
    Preset("vicuna-7b", ("7b",), "lmsys/vicuna-7b-v1.5", 6_738_415_616, _VICUNA_7B, 4096, *LARGE),
    Preset("zephyr-7b", ("mistral-7b",), "HuggingFaceH4/zephyr-7b-beta", 7_241_732_096, _ZEPHYR_7B, 4096, *LARGE),
    Preset("llama-3.1-8b", ("8b",), "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, _LLAMA_8B, 4096, *LARGE),
    Preset("vicuna-13b", ("13b",), "lmsys/vicuna-13b-v1.5", 13_015_864_320, _VICUNA_13B, 4096, *LARGE),
    Preset("vicuna-33b", ("33b",), "lmsys/vicuna-33b-v1.3", 32_528_943_616, _VICUNA_33B, 2048, *LARGE),
)


def find_preset(name: str) -> Preset:
    """Find a preset by its name or a part of it: ``13b``, ``Vicuna-13B``, ``llama-3.2-1b``.

    Raises:
        UsageError: no preset or several have the name; with the nearest names.
    """
    names = {alias: preset.name for preset in PRESETS for alias in (preset.name, *preset.aliases)}
    found = look_up(name, names, "model size")
    return next(preset for preset in PRESETS if preset.name == found)


def look_up(name: str, names: Mapping[str, str], what: str, prefixes: tuple[str, ...] = ()) -> str:
    """Find the value of a key: ``name`` itself, ``name`` after one of ``prefixes``, or the only key that contains it.

    Ignores case, spaces and signs between words.

    Raises:
        UsageError: no key or several match; with the nearest values.
    """
    import difflib

    plain = {_plain(key): value for key, value in names.items()}
    asked = _plain(name)
    for prefix in ("", *prefixes):
        if prefix + asked in plain:
            return plain[prefix + asked]
    ending = [value for key, value in names.items() if name.lower() in re.split(r"[-\s]", key.lower())]
    containing = [value for short, value in plain.items() if asked and asked in short]
    found = list(dict.fromkeys(ending or containing))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{what} {name!r} may be {', '.join(found)}", hint="give one of these names in full")
    near = dict.fromkeys(plain[key] for key in difflib.get_close_matches(asked, plain, n=3, cutoff=0.5))
    raise UsageError(f"unknown {what} {name!r}", hint=f"the nearest: {', '.join(near) or 'none'}; all: medusa-deploy plan --list")


def _plain(name: str) -> str:
    """Remove case, spaces and signs, but keep the point between digits: 3.2 isn't 32."""
    words = name.lower().replace("nvidia", "").replace("geforce", "")
    return "".join(sign for sign in words if sign.isalnum() or sign == ".")
