"""Finds what a model folder says beside its weights, and refuses what transformers would pass over or run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.errors import CheckpointError
from ...runtime.files.json_file import read_json_file
from ...runtime.files.staging import check_path

# Every call of transformers takes it: code in a checkpoint is never run, and nobody is asked whether to run it.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
GENERATION_CONFIG = "generation_config.json"
_ADAPTER = "adapter_config.json"
_MAX_JSON_BYTES = 16 << 20
_GGUF_MAGIC = b"GGUF"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# Heads are read by themselves; position frequencies and masks are computed.
_SILENT = re.compile(
    r"(?:(?:module|_orig_mod)\.)*medusa_heads?\.|.*(?:rotary_emb\.|rotary_pos_emb\.)|.*(?:attn|attention)\.(?:masked_)?bias$"
)
_CODES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_SCALE = re.compile(r".*(?:scale|scale_inv|scales|scaling_factor|zero_point|absmax|quant_state.*)$")


def find_model(source: Path) -> tuple[Path, str | None]:
    """Find a model's folder, and the name of the GGUF file in it; None for a folder of safetensors.

    A GGUF file is known by its first bytes, whatever its name. In a folder it counts if no other weights lie beside it.

    Raises:
        CheckpointError: no such model, a file of another kind, several GGUF files, or an adapter instead of a model.
    """
    check_path(source, CheckpointError)
    if not source.exists():
        raise CheckpointError(
            f"no such model: {source}", hint="give a folder with config.json and *.safetensors, or a .gguf file"
        )
    if source.is_file():
        with source.open("rb") as file:
            is_gguf = file.read(4) == _GGUF_MAGIC
        if source.suffix.lower() == ".gguf" and not is_gguf:
            raise CheckpointError(f"{source} doesn't begin as a GGUF file does", hint="download or copy it again")
        if not is_gguf:
            raise CheckpointError(f"{source} is a file of unknown kind", hint="give the folder that holds it, or a .gguf file")
        return source.parent, source.name
    if (source / _ADAPTER).is_file():
        raise CheckpointError(
            f"{source} holds a PEFT adapter ({_ADAPTER}), which changes another model or the one beside it",
            hint="merge it first: merge_and_unload() and save_pretrained() of peft, then export the merged folder",
        )
    if any(next(source.glob(pattern), None) for pattern in _WEIGHTS):
        return source, None
    ggufs = sorted(path.name for path in source.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    if len(ggufs) > 1:
        raise CheckpointError(f"{source} holds {len(ggufs)} GGUF files: {', '.join(ggufs[:8])}", hint="give one of the files")
    return source, ggufs[0] if ggufs else None


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Read the end-of-sequence ids of ``generation_config.json``; none without the file.

    Raises:
        CheckpointError: the file is damaged, or an id is no token id.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return ()
    hint = f"download {GENERATION_CONFIG} again, or remove it: the ids of config.json remain"
    raw = read_json_file(path, limit=_MAX_JSON_BYTES, error=CheckpointError, hint=hint)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is a {type(raw).__name__}, not an object", hint=hint)
    return token_ids(raw.get("eos_token_id"), GENERATION_CONFIG)


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """Check the ``eos_token_id`` of a config: one id, several, or none.

    Raises:
        CheckpointError: it is something else.
    """
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    wrong = [each for each in ids if not isinstance(each, int) or isinstance(each, bool) or each < 0]
    if wrong:
        raise CheckpointError(
            f"eos_token_id in {where} is {value!r:.60}", hint="write a token id, a list of them, or null, and export again"
        )
    return tuple(ids)


def folder_notes(folder: Path, config: Any) -> list[str]:
    """Say what a folder of safetensors holds that doesn't run."""
    notes = []
    if getattr(config, "auto_map", None):
        notes.append(f"config.json names code of its own, which doesn't run: transformers' own {config.model_type} does")
    index = "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() and (folder / index).is_file():
        notes.append(f"weights are those of model.safetensors; {index} and its shards beside it aren't read")
    return notes


def check_types(folder: Path) -> None:
    """Refuse weights that are stored as integers: transformers would take their codes for values.

    Raises:
        CheckpointError: such a weight, or a damaged file.
    """
    import safetensors

    single = folder / "model.safetensors"
    for path in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                kinds = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} can't be read: {error}", hint="download or copy it again") from error
        codes = [name for name, kind in kinds.items() if name.endswith(".weight") and kind in _CODES]
        if codes:
            raise CheckpointError(
                f"{codes[0]} in {path.name} is {kinds[codes[0]]}, and config.json doesn't say how its codes become numbers",
                hint="convert the checkpoint to float16, bfloat16 or float32 weights",
            )


def check_unused(module: Any, names: Iterable[str], source: Path) -> list[str]:
    """Say which stored tensors the config has no place for.

    Raises:
        CheckpointError: a bias, a scale, a further layer, or another part of a module that runs: without it the result differs.
    """
    ignored = [re.compile(each) for each in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = sorted(name for name in names if not _SILENT.match(name) and not any(each.search(name) for each in ignored))
    if not unused:
        return []
    modules = {name for name, _ in module.named_modules()} - {"", module.base_model_prefix}
    needed = [name for name in unused if name.endswith(".bias") or _SCALE.match(name) or _ancestors(name) & modules]
    if needed:
        raise CheckpointError(
            f"{source} holds {len(needed)} tensors that its config.json has no place for, such as {needed[0]}",
            hint="the model computes with them: correct config.json (biases, number of layers), or convert the checkpoint to "
            "plain float16, bfloat16 or float32 weights",
        )
    return [f"{len(unused)} tensors of the checkpoint aren't part of {type(module).__name__}: not read, such as {unused[0]}"]


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}
