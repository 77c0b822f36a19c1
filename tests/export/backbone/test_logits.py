"""What a causal LM does behind its projection is read from its code, not from its config."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_deploy.runtime.errors import UnsupportedArchitectureError
from support.families import Family, make_config

torch: Any = pytest.importorskip("torch")
logits: Any = pytest.importorskip("medusa_deploy.export.backbone.logits")
transformers: Any = pytest.importorskip("transformers")

HEAD_DIM = {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": (Family("LlamaConfig"), 1.0, None),
    "llama, with a field that its model doesn't read": (Family("LlamaConfig", {"final_logit_softcapping": 30.0}), 1.0, None),
    "gemma2": (Family("Gemma2Config", {**HEAD_DIM, "final_logit_softcapping": 30.0}), 1.0, 30.0),
    "gemma2 without a cap": (Family("Gemma2Config", {**HEAD_DIM, "final_logit_softcapping": None}), 1.0, None),
    "cohere": (Family("CohereConfig", {"logit_scale": 0.0625}), 0.0625, None),
    "granite": (Family("GraniteConfig", {"logits_scaling": 6.0}), 0.1666667, None),
}


def model(family: Family) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(make_config(family)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_scale_and_cap_are_those_that_the_model_computes(name: str) -> None:
    family, scale, cap = MODELS[name]
    module = model(family)
    assert logits.find_logit_change(module) == logits.LogitChange(scale, cap)
    for changed in (module.get_decoder(), module.get_output_embeddings()):
        assert "forward" not in changed.__dict__, "it is itself again"


def test_a_change_computes_what_it_says() -> None:
    change = logits.LogitChange(2.0, 5.0)
    given = torch.tensor([-100.0, 0.0, 0.5])
    assert torch.allclose(change(given), torch.tanh(given * 2 / 5) * 5)
    assert logits.NO_CHANGE(given) is given


REFUSED: dict[str, tuple[Any, str]] = {
    "turned around": (lambda out: -out, "more than a scale and a soft cap"),
    "cut off": (lambda out: out.clamp(max=30), "more than a scale and a soft cap"),
    "moved": (lambda out: out + 1, "more than a scale and a soft cap"),
    "fewer": (lambda out: out[..., :5], "more than a scale"),
    "failing": (lambda out: out.no_such_thing, "isn't a decoder followed by a projection: AttributeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_changes_are_refused(name: str) -> None:
    change, message = REFUSED[name]

    class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = change(output.logits)
            return output

    with torch.device("meta"):
        module = Odd(make_config(Family("LlamaConfig")))
    with pytest.raises(UnsupportedArchitectureError, match=message):
        logits.find_logit_change(module)


def test_another_state_than_the_decoders_is_refused() -> None:
    class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Any, **_options: Any) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden + torch.arange(hidden.shape[-1])))

    with torch.device("meta"):
        module = Odd(make_config(Family("LlamaConfig")))
    with pytest.raises(UnsupportedArchitectureError, match="between its decoder and its projection"):
        logits.find_logit_change(module)
