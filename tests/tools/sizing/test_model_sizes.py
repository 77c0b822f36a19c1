"""The table of model sizes against what is published, against transformers, and against the rules of bundles and engines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.tools.sizing.capacity import backbone_of
from medusa_deploy.tools.sizing.model_sizes import PRESETS, Preset, find_preset
from support.records import manifest

every_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


@every_preset
def test_a_shape_has_the_published_number_of_parameters(preset: Preset) -> None:
    assert backbone_of(preset.shape).parameters == preset.parameters


@every_preset
def test_transformers_makes_the_same_model_of_a_shape(preset: Preset) -> None:
    transformers = pytest.importorskip("transformers")
    from medusa_deploy.export.backbone.backbone import check_architecture
    from medusa_deploy.export.estimate import empty_module

    shape = preset.shape
    config = getattr(transformers, preset.config)(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=shape.tied,
    )
    check_architecture(config, preset.capacity)
    module = empty_module(config)
    assert type(module).__name__ == shape.architecture
    counts = {name: value.numel() for name, value in module.named_parameters()}
    assert sum(counts.values()) == preset.parameters
    biased = any("q_proj.bias" in name for name in counts)
    assert biased == shape.qkv_bias
    layers = sum(count for name, count in counts.items() if ".layers." in name)
    assert backbone_of(shape).layers.parameters == layers


@every_preset
def test_suggestions_obey_the_rules_of_bundles_and_engines(preset: Preset) -> None:
    from medusa_deploy.export.engines.options import profiles_for

    rows = preset.rows
    assert rows == tuple(sorted(set(rows)))
    assert rows[0] == 1
    assert preset.prefill_chunk <= preset.capacity <= preset.shape.max_position
    limits = {"capacity": preset.capacity, "max_rows": rows[-1], "prefill_chunk": preset.prefill_chunk}
    profiles = profiles_for(manifest(batch=1, **limits), rows)
    assert len(profiles) == len(rows) + 1


def test_names_and_aliases_mean_one_size_each() -> None:
    names = [name for preset in PRESETS for name in (preset.name, *preset.aliases)]
    assert len(set(names)) == len(names)
    for preset in PRESETS:
        for name in (preset.name, *preset.aliases, preset.name.upper(), preset.name.replace("-", " ")):
            assert find_preset(name) is preset


@pytest.mark.parametrize(("asked", "meant"), [("13B", "vicuna-13b"), ("mistral", "zephyr-7b"), ("smollm2 135M", "smollm2-135m")])
def test_a_part_of_a_name_will_do(asked: str, meant: str) -> None:
    assert find_preset(asked).name == meant


def test_what_may_be_two_sizes_is_refused_with_both() -> None:
    with pytest.raises(UsageError, match="'3b' may be qwen2.5-3b, llama-3.2-3b$"):
        find_preset("3b")


@pytest.mark.parametrize("asked", ["vicunna-13b", "vicuna 31b"])
def test_an_unknown_size_gets_the_nearest(asked: str) -> None:
    with pytest.raises(UsageError, match="unknown model size") as caught:
        find_preset(asked)
    assert "vicuna-13b" in caught.value.hint


@pytest.mark.parametrize("asked", ["", "zzz", "-"])
def test_what_resembles_nothing_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="unknown model size") as caught:
        find_preset(asked)
    assert "plan --list" in caught.value.hint


def test_a_wrong_shape_would_be_noticed() -> None:
    shape = replace(find_preset("llama-3.2-1b").shape, kv_heads=4)
    assert backbone_of(shape).parameters != find_preset("llama-3.2-1b").parameters
