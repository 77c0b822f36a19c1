"""Reads and writes ``manifest.json``: the facts of a bundle and the list of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BundleSchemaError, TreeError, UsageError
from ..tree import Tree
from .backbone import BackboneShape
from .heads import PlattScaling, parse_platt_scaling
from .json_file import is_int, record

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """Number and form of the Medusa heads. The graph returns ``top_k`` candidates for each head.

    ``platt_scaling``: slope and offset that turn a head's confidence into its hit rate.
    """

    kind: str
    num_heads: int
    top_k: int
    projection: str
    draft_vocab_size: int
    platt_scaling: PlattScaling = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that the graphs allow.

    ``capacity``: tokens of a slot. ``cache_rows``: rows S of each cache. ``max_rows``: rows of the largest tree. ``batch``:
    largest number of slots. ``prefill_chunk``: largest number of prompt tokens in one step.
    """

    capacity: int
    cache_rows: int
    max_rows: int
    batch: int
    prefill_chunk: int


@dataclass(frozen=True, slots=True)
class TextFacts:
    """Paths of the tokenizer and the chat template, and special tokens. Without a tokenizer the bundle takes token ids only.

    ``special_tokens``: what chat templates read, literals by their names (``bos_token``, ``pad_token``, ``image_token``, …).
    """

    tokenizer: str | None = None
    chat_template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a bundle. Paths are relative to its folder.

    ``variants``: name of a step graph (``standard``, ``cpu``) to its path. A bundle has ``standard``, or was exported in few bits
    and has one quantised variant alone. ``engines``: target to the path of its engine's record
    (:mod:`.engine_record`).
    """

    backbone: BackboneShape
    heads: HeadFacts
    limits: Limits
    text: TextFacts
    dtype: str
    variants: Mapping[str, str]
    heads_graph: str
    trees: Mapping[str, list[list[int]]]
    default_tree: str
    files: Mapping[str, FileRecord]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def tree(self, name: str | None = None) -> Tree:
        """Compiles a tree of the bundle (None: the default tree) and checks it against the heads.

        Raises:
            BundleSchemaError: the bundle has no tree of this name.
            TreeError: the tree breaks a rule or doesn't fit the heads.
        """
        choices = self.trees.get(name or self.default_tree)
        if choices is None:
            raise BundleSchemaError(
                f"the bundle has no tree {name or self.default_tree!r}", hint=f"its trees: {', '.join(self.trees)}"
            )
        tree = Tree.from_choices(choices)
        tree.check_fits(self.heads.num_heads, self.heads.top_k)
        return tree

    def graph(self, variant: str) -> str:
        """Returns the path of a variant's step graph.

        Raises:
            UsageError: the bundle has no such variant. One that was exported in few bits has no other.
        """
        if variant not in self.variants:
            own = ", ".join(self.variants)
            only = "it was exported in few bits: export the checkpoint without --precision" if few_bits_only(self) else ""
            raise UsageError(f"the bundle has no graph {variant!r}, only {own}", hint=only or f"its variants: {own}")
        return self.variants[variant]

    def to_json(self) -> str:
        """Returns the file's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def few_bits_only(manifest: Manifest) -> bool:
    """Tells if a bundle was exported in few bits: it then has none of the graphs that variants are made from."""
    return "standard" not in manifest.variants


def cpu_twin(graph: str) -> str:
    """Returns the path of a graph's twin in the operators of ONNX Runtime's CPU provider. Only the heads' graph may have one."""
    return f"{graph.removesuffix('.onnx')}.cpu.onnx"


def packed_twin(graph: str, slots: int) -> str:
    """Returns the path of a CPU graph's twin that steps so many slots at once. Only CPU graphs may have them."""
    return f"{graph.removesuffix('.onnx')}.{slots}.onnx"


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        BundleSchemaError: the text isn't JSON, its schema is newer, or a field is missing, unknown or mistyped.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleSchemaError(f"{MANIFEST_NAME} is not JSON: {error}", hint="export the bundle again") from None
    if not isinstance(raw, dict):
        raise BundleSchemaError(f"{MANIFEST_NAME} is a {type(raw).__name__}, not an object", hint="export the bundle again")
    version = raw.get("schema_version")
    if not is_int(version) or version < 1:
        raise BundleSchemaError(f"{MANIFEST_NAME} has schema_version {version!r}", hint="export the bundle again")
    if version > SCHEMA_VERSION:
        raise BundleSchemaError(
            f"the bundle has schema version {version}; this program reads up to {SCHEMA_VERSION}",
            hint="upgrade medusa-deploy, or export the bundle again with this version",
        )
    try:
        if version == 1:  # heads that nobody measured, and no engines
            raw = {"engines": {}, **raw, "heads": {"platt_scaling": [], **raw["heads"]}}
        if version < 3:  # two special tokens, each with a field of its own
            raw = {**raw, "schema_version": SCHEMA_VERSION, "text": _with_special_tokens(raw["text"])}
        heads = raw["heads"]
        scaling = parse_platt_scaling(heads["platt_scaling"], heads["num_heads"])
        manifest: Manifest = record(
            Manifest,
            {
                **raw,
                "backbone": record(BackboneShape, raw["backbone"]),
                "heads": record(HeadFacts, {**heads, "platt_scaling": scaling}),
                "limits": record(Limits, raw["limits"]),
                "text": record(TextFacts, {**raw["text"], "eos_token_ids": _ids(raw["text"]["eos_token_ids"])}),
                "files": {name: record(FileRecord, entry) for name, entry in raw["files"].items()},
            },
        )
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, TreeError) as error:
        raise BundleSchemaError(f"{MANIFEST_NAME} breaks the schema: {error}", hint="export the bundle again") from None
    return manifest


def _ids(raw: Any) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise ValueError(f"eos_token_ids is {raw!r:.80}")  # noqa: TRY004 - all of these are errors of the schema
    return tuple(raw)


def _with_special_tokens(text: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the special tokens of an old record into one field. Keeps what is malformed, which is refused later."""
    names = ("bos_token", "eos_token")
    special = {name: text[name] for name in names if text[name] is not None}
    return {**{name: value for name, value in text.items() if name not in names}, "special_tokens": special}


def _check(manifest: Manifest) -> None:
    """Checks the rules between fields. Raises ValueError or TreeError."""
    graphs = [*manifest.variants.values(), *manifest.engines.values(), manifest.heads_graph]
    names = [*graphs, manifest.text.tokenizer, manifest.text.chat_template]
    missing = [name for name in names if name is not None and name not in manifest.files]
    quantised = manifest.provenance.get("quantised", {})
    if missing or not ("standard" in manifest.variants or (manifest.variants and set(manifest.variants) <= set(quantised))):
        raise ValueError(f"it names files that it doesn't list: {missing or 'the standard graph'}")
    if manifest.default_tree not in manifest.trees:
        raise ValueError(f"its default tree {manifest.default_tree!r} is none of its trees")
    limits, heads = manifest.limits, manifest.heads
    records = (asdict(manifest.backbone), asdict(heads), asdict(limits))
    small = [name for record in records for name, value in record.items() if isinstance(value, int) and value < 1]
    if small or manifest.dtype not in ("float32", "float16"):
        raise ValueError(f"sizes below 1: {small}" if small else f"unknown dtype {manifest.dtype!r}")
    if limits.cache_rows < heads.num_heads + limits.capacity + limits.max_rows:
        raise ValueError(
            f"{limits.cache_rows} cache rows can't hold {limits.capacity} tokens and {limits.max_rows} rows of a step"
        )
    for name in manifest.trees:
        rows = manifest.tree(name).rows
        if rows > limits.max_rows:
            raise ValueError(f"the tree {name!r} has {rows} rows, over the limit of {limits.max_rows}")
