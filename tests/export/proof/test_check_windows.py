"""The check of an export looks past the windows of the model's layers, or says that it didn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.proof import check, linked_check
from medusa_deploy.export.trace import step
from medusa_deploy.runtime.errors import ExportMismatchError
from support.families import Family, make_family

WINDOW = 40  # longer than the prompt and the steps of a check without windows
OPTIONS: dict[str, Any] = {"capacity": 96, "top_k": 4, "max_rows": 8}
MISTRAL = Family("MistralConfig", {"num_key_value_heads": 2, "sliding_window": WINDOW})
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3 = Family(
    "Gemma3TextConfig",
    {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 4,
        "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL],
    },
)


@pytest.fixture(autouse=True)
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linked models are checked as big ones are: by their first layers."""
    monkeypatch.setattr(linked_check, "WHOLE_BYTES", 0)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(MISTRAL, tmp_path_factory.mktemp("mistral"))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["copied", "linked"])
def test_the_check_crosses_a_window(mistral: Path, tiny_heads: Path, tmp_path: Path, weights: str) -> None:
    report = export_bundle(mistral, tiny_heads, tmp_path / "bundle", weights=weights, **OPTIONS)
    assert all((each["windows"], each["missed"]) == ((WINDOW,), ()) for each in report["check"].values())
    assert not any("window" in warning for warning in report["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["copied", "linked"])
def test_a_wrong_window_is_found(
    mistral: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    right = step.visibility_mask

    def wrong(*arguments: Any) -> torch.Tensor:
        return right(*arguments[:-1], arguments[-1] + 8)

    monkeypatch.setattr(step, "visibility_mask", wrong)
    with pytest.raises(ExportMismatchError):
        export_bundle(mistral, tiny_heads, tmp_path / "bundle", weights=weights, **OPTIONS)
    monkeypatch.setattr(check, "MOST_WORK", 0)
    report = export_bundle(mistral, tiny_heads, tmp_path / "bundle", weights=weights, **OPTIONS)
    assert all((each["windows"], each["missed"]) == ((), (WINDOW,)) for each in report["check"].values())
    assert sum(f"window of {WINDOW} tokens" in warning for warning in report["warnings"]) == 1


@pytest.mark.slow
def test_linked_layers_are_checked_up_to_the_first_of_each_kind(tiny_heads: Path, tmp_path: Path) -> None:
    model = make_family(GEMMA3, tmp_path / "model")
    report = export_bundle(model, tiny_heads, tmp_path / "bundle", weights="linked", **OPTIONS)
    assert (report["weights"]["checked_layers"], report["weights"]["layers"]) == (3, 4)
    assert all(each["windows"] == (WINDOW,) for each in report["check"].values())
    assert all(each["max_logit_error"] < 1e-4 * max(1, each["logit_scale"]) for each in report["check"].values())


class _Module:
    """Sizes of a causal LM: ``parameters`` numbers, ``vocabulary`` tokens, 8 heads."""

    def __init__(self, parameters: int, vocabulary: int) -> None:
        self._numbers = [torch.empty(parameters, device="meta")]
        self._projection = torch.nn.Linear(4, vocabulary, device="meta")
        self.config = type("Config", (), {"num_attention_heads": 8})

    def parameters(self) -> list[torch.Tensor]:
        return self._numbers

    def named_modules(self) -> list[tuple[str, Any]]:
        return []

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self._projection


@pytest.mark.parametrize(
    ("parameters", "vocabulary", "windows", "tokens"),
    [
        (268_000_000, 262_144, (512,), 536),  # Gemma 3 270M
        (135_000_000, 49_152, (512, 4096), 4120),
        (7_000_000_000, 32_000, (4096,), 24),  # Mistral 7B
        (7_000_000, 262_144, (512, 4096), 536),  # 4 GB of logits
        (7_000_000, 1000, (16_384,), 24),  # 8 GB of scores
        (7_000_000, 1000, (8190,), 24),
        (135_000_000, 49_152, (), 24),
    ],
)
def test_the_longest_window_is_crossed_that_time_and_memory_allow(
    parameters: int, vocabulary: int, windows: tuple[int, ...], tokens: int
) -> None:
    assert check.prompt_length(_Module(parameters, vocabulary), windows, 32_768, 10) == tokens


def test_the_check_stays_within_the_capacity() -> None:
    module = _Module(1000, 100)
    assert check.prompt_length(module, (90,), 96, 10) == 86
    assert check.prompt_length(module, (30,), 32, 10) == 24
