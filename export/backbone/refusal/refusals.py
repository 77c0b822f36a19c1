"""Refuses by name what the step graph can't express, from the config and the headers of a model, before a weight is loaded.

:func:`refuse` looks at four things in turn: how the weights are stored, what the config says that the model is, which modules
transformers makes of it (without weights), and what those modules do in a step (:mod:`.rehearsal`). Fields of the config that
no module reads change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....runtime.errors import CheckpointError, DeployError, UnsupportedArchitectureError
from ..checkpoint import find_stored
from .causes import first_lines
from .rehearsal import rehearse

_OTHER = "the step graph expresses decoders whose every layer is attention and a dense MLP; choose another backbone"
_ALONE = "save its language model as a checkpoint of its own (a config of the text model alone), and export that"
_CONVERT = "export the checkpoint that it was made of, or convert it: load it with transformers, dequantize(), save_pretrained()"
_FORMATS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "modelopt": "NVIDIA Model Optimizer",
}
# Tensors that only quantised checkpoints have, by the ends of their names.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight.absmax": "bitsandbytes",
    ".weight.SCB": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Parts of a model that stand beside its decoder, by the fields of the config that describe them.
_PARTS = {"vision_config": "images", "vq_config": "images", "video_config": "video", "audio_config": "sound"}
_RECURRENT = re.compile(
    r"Mamba|SSM|Rwkv|LSTM|GRU|DeltaNet|DeltaAttention|Recurrent|RgLru|LinearAttention|LightningAttention|BambaMixer"
)


def refuse(config: Any, folder: Path) -> None:
    """Refuse a model that the step graph can't express. Reads no weights.

    ``folder`` holds the checkpoint; there may be no safetensors in it.

    Raises:
        CheckpointError: the weights are quantised.
        UnsupportedArchitectureError: names the family, what it has, and the module.
    """
    _refuse_quantised(config, folder)
    _refuse_config(config)
    module = skeleton(config)
    for rule in _RULES:
        found = rule(module)
        if found is not None:
            raise UnsupportedArchitectureError(f"{config.model_type} {found}", hint=_OTHER)
    rehearse(module)


def skeleton(config: Any) -> Any:
    """Make the causal LM of ``config`` without weights or storage, as a transformers module.

    Raises:
        UnsupportedArchitectureError: transformers can't make one.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except DeployError:
        raise
    except Exception as error:  # transformers raises whatever its models raise
        raise UnsupportedArchitectureError(
            f"transformers can't make a causal language model of this {config.model_type} config: {first_lines(error)}",
            hint="check the sizes in config.json, and whether a newer transformers reads it",
        ) from error


# -- weights -------------------------------------------------------------------------------------------------------


def _refuse_quantised(config: Any, folder: Path) -> None:
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        method = str(getattr(method, "value", method) or "unnamed")
        if method == "unnamed" and isinstance(settings, dict) and ("load_in_4bit" in settings or "load_in_8bit" in settings):
            method = "bitsandbytes"
        raise CheckpointError(
            f"{config.model_type}'s weights are quantised: config.json names the format {_FORMATS.get(method, method)}",
            hint=f"the trace reads 16-bit and 32-bit floats: {_CONVERT}",
        )
    try:
        stored = find_stored(folder)
    except DeployError:
        return  # other formats, or damaged: the loader says which
    for name, tensor in stored.items():
        packed = next((each for end, each in _PACKED.items() if name.endswith(end)), None)
        if packed is None and name.endswith(".weight") and tensor.dtype not in _FLOATS:
            packed = "FP8" if tensor.dtype.startswith("F8") else f"{tensor.dtype} integers"
        if packed is not None:
            raise CheckpointError(
                f"{config.model_type}'s weights are quantised: {name} ({tensor.dtype}) in {tensor.file.name} "
                f"is of the format {packed}",
                hint=f"the trace reads 16-bit and 32-bit floats: {_CONVERT}",
            )


# -- config --------------------------------------------------------------------------------------------------------


def _refuse_config(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(f"{family} has an encoder beside its decoder", hint=_OTHER)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitectureError(
            f"{family} is no causal language model: transformers has none for {type(config).__name__}",
            hint="export a model that generates text, token after token",
        )
    parts = sorted({reads for field, reads in _PARTS.items() if getattr(config, field, None) is not None})
    if parts:
        raise UnsupportedArchitectureError(
            f"{family} reads {' and '.join(parts)} beside text ({type(config).__name__})",
            hint=_ALONE,
        )
    inner = config.get_text_config(decoder=True)
    if inner is not config:
        raise UnsupportedArchitectureError(
            f"{family} is a language model inside of another model ({type(config).__name__} holds {type(inner).__name__})",
            hint=_ALONE,
        )
    if getattr(config, "is_decoder", True) is False:
        raise UnsupportedArchitectureError(
            f"{family} is an encoder: is_decoder is false, so every token sees those behind it",
            hint="set is_decoder to true in config.json if the model was trained as a decoder",
        )


# -- modules -------------------------------------------------------------------------------------------------------


def _experts(module: Any) -> str | None:
    return _first_module(
        module, lambda name, child: "Experts" in type(child).__name__ or name.endswith(".experts"), "is a mixture of experts"
    )


def _latent_attention(module: Any) -> str | None:
    return _first_module(
        module, lambda name, _: name.endswith((".kv_b_proj", ".kv_a_proj_with_mqa", ".kv_a_proj")), "has latent attention (MLA)"
    )


def _recurrent(module: Any) -> str | None:
    return _first_module(
        module, lambda _, child: _RECURRENT.search(type(child).__name__) is not None, "has recurrent layers, which keep a state"
    )


def _convolutions(module: Any) -> str | None:
    return _first_module(
        module,
        lambda _, child: isinstance(child, (nn.Conv1d, nn.Conv2d)) or "ShortConv" in type(child).__name__,
        "has convolutional layers",
    )


def _encoder(module: Any) -> str | None:
    return _first_module(
        module, lambda name, _: name.endswith((".encoder_attn", ".crossattention", ".cross_attn")), "attends to an encoder"
    )


def _sinks(module: Any) -> str | None:
    for name, _ in module.named_parameters():
        if re.search(r"(^|[._])sinks?(_|$)", name.rsplit(".", 1)[-1]):
            return f"has attention sinks: {name}"
    return None


def _alibi(module: Any) -> str | None:
    builders = [
        f"{type(child).__name__}.{name}"
        for child in module.modules()
        for name in ("build_alibi_tensor", "build_mpt_alibi_tensor")
        if hasattr(child, name)
    ]
    if builders:
        return f"adds positions to the attention's logits (ALiBi): {builders[0]}"
    return "adds positions to the attention's logits (ALiBi): alibi is true" if getattr(module.config, "alibi", False) else None


def _first_module(module: Any, has: Callable[[str, nn.Module], bool], what: str) -> str | None:
    for name, child in module.named_modules():
        if name and has(name, child):
            return f"{what}: {name} is {type(child).__name__}"
    return None


_RULES = (_recurrent, _experts, _latent_attention, _sinks, _alibi, _encoder, _convolutions)
