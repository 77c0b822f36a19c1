"""Loads a backbone through transformers, reads its sizes, and refuses what the step graph can't express."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...runtime.errors import CheckpointError, DeployError, UnsupportedArchitectureError
from ...runtime.files.backbone import BackboneShape
from .adapter import merge_adapter
from .library_errors import LoadReports, cause, kept_reports
from .record import DTYPES, Backbone

if TYPE_CHECKING:
    from ...runtime.files.adapter_file import Adapter

# Position encodings by what their frequencies depend on: nothing, or the length of a long sequence.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Settings that change logits after the vocabulary projection, and the value that changes nothing.
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}


def load_backbone(source: Path, dtype: str, capacity: int, adapter: Adapter | None = None) -> Backbone:
    """Load a folder of safetensors (or a GGUF file, or a folder with one) in ``dtype`` for tracing.

    ``adapter``: low-rank changes. They are merged in float32, before the weights become ``dtype``.

    Raises:
        CheckpointError: no such model, or non-finite weights.
        HeadsError, HeadsMismatchError: the adapter is damaged, or belongs to another model.
        UnsupportedArchitectureError: sliding windows shorter than ``capacity``, length-dependent positions within it, …
    """
    load_config(source, capacity)
    module = load_module(source, dtype if adapter is None else "fp32")
    if adapter is not None:
        module = merge_adapter(module, adapter)
        for parameter in module.parameters():  # buffers such as position frequencies stay float32
            parameter.data = parameter.data.to(DTYPES[dtype])
    _check_finite(module)
    freeze_rope(module)
    return Backbone(module, backbone_shape(module), DTYPES[dtype])


def load_module(source: Path, dtype: str) -> Any:
    """Load the module of a model as transformers runs it, in evaluation mode.

    Raises:
        CheckpointError: no such model, or tensors are missing.
    """
    from transformers import AutoModelForCausalLM

    folder, options = locate(source)
    with transformers_errors(source):
        module, info = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True, **options)
    module.eval()
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of {type(module).__name__}, such as {missing[0]}",
            hint="check that config.json belongs to these weights and that the download is complete",
        )
    return module


def load_config(source: Path, capacity: int) -> Any:
    """Load the config of a model and check its architecture; the weights stay on disk.

    Raises:
        CheckpointError: no such model.
        UnsupportedArchitectureError: see :func:`check_architecture`.
    """
    from transformers import AutoConfig

    folder, options = locate(source)
    with transformers_errors(source):
        config = AutoConfig.from_pretrained(folder, **options)
        check_architecture(config, capacity)
    return config


@contextlib.contextmanager
def transformers_errors(source: Path) -> Iterator[None]:
    """Silence the progress bars and notes of transformers, and turn its exceptions into CheckpointError."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    reports = LoadReports()
    try:
        with kept_reports(reports), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DeployError:
        raise
    except Exception as error:  # transformers raises whatever its readers raise
        raise CheckpointError(
            f"transformers can't load {source}: {cause(error, reports)}",
            hint="check that the folder has config.json and *.safetensors (or a .gguf file) and that the download is complete",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def locate(source: Path) -> tuple[Path, dict[str, Any]]:
    """Return a model's folder, and the options that select a GGUF file in it."""
    if not source.exists():
        raise CheckpointError(
            f"no such model: {source}", hint="give a folder with config.json and *.safetensors, or a .gguf file"
        )
    if source.is_file():
        if source.suffix != ".gguf":
            raise CheckpointError(f"{source} is a file of unknown kind", hint="give the folder that holds it, or a .gguf file")
        return source.parent, {"gguf_file": source.name}
    ggufs = sorted(source.glob("*.gguf"))
    if not (source / "config.json").exists() and len(ggufs) == 1:
        return source, {"gguf_file": ggufs[0].name}
    return source, {}


def check_architecture(config: Any, capacity: int) -> None:
    """Refuse settings that the step graph would compute wrongly.

    Raises:
        UnsupportedArchitectureError: names the setting, its value and the capacity.
    """
    windows = _sliding_windows(config)
    if windows and min(windows) < capacity:
        raise UnsupportedArchitectureError(
            f"{config.model_type} attends to a sliding window of {min(windows)} tokens, fewer than the capacity {capacity}",
            hint=f"export with --capacity {min(windows)} or less",
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedArchitectureError(
            f"{config.model_type} caps its attention logits at {config.attn_logit_softcapping}",
            hint="the step graph has no soft cap; choose another backbone",
        )
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise UnsupportedArchitectureError(
                f"{config.model_type} changes its logits after the projection: {name} is {value}",
                hint="the step graph ends with the projection; choose another backbone",
            )
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"{config.model_type} has {', '.join(sorted(foreign)) or 'an encoder'}",
            hint="the step graph expresses decoders with full attention",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default") if "rope_type" in rope or not rope else _nested_rope(config, rope)
    if kind in _LENGTH_DEPENDENT_ROPE:
        limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        limit = int(limit or config.max_position_embeddings)
        if capacity > limit:
            raise UnsupportedArchitectureError(
                f"{config.model_type} changes its {kind} position frequencies beyond {limit} tokens, the capacity is {capacity}",
                hint=f"export with --capacity {limit} or less",
            )
    elif kind not in _STATIC_ROPE:
        raise UnsupportedArchitectureError(
            f"{config.model_type} uses the position encoding {kind!r}", hint=f"supported: {', '.join(_STATIC_ROPE)}"
        )


def _nested_rope(config: Any, rope: dict[str, Any]) -> str:
    kinds = {value.get("rope_type", "default") for value in rope.values() if isinstance(value, dict)}
    return kinds.pop() if len(kinds) == 1 else "/".join(sorted(kinds)) or "default"


def _sliding_windows(config: Any) -> list[int]:
    """Return the sliding windows that some layer uses."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return []
    kinds = getattr(config, "layer_types", None)
    return [int(window)] if kinds is None or "sliding_attention" in kinds else []


def backbone_shape(module: Any) -> BackboneShape:
    """Read the sizes from the config; the vocabulary's from the projection, which may have more rows than the config says."""
    config = module.config
    attention_heads = config.num_attention_heads
    return BackboneShape(
        architecture=type(module).__name__,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // attention_heads,
        vocab_size=int(module.get_output_embeddings().weight.shape[0]),
    )


def _check_finite(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{name} holds NaN or infinite values", hint="the checkpoint is damaged, or overflows in this --dtype"
            )


def freeze_rope(module: torch.nn.Module) -> None:
    """Keep the update of length-dependent frequencies out of the trace: within the checked capacity they never change."""
    for child in module.modules():
        if getattr(child, "rope_type", None) in _LENGTH_DEPENDENT_ROPE:
            child.rope_type = "static"  # type: ignore[assignment]
