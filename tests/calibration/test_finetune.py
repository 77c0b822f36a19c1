"""The second stage on a tiny backbone: what learns, what stays, and that a run goes on where it stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load  # noqa: E402

from medusa_deploy.calibration.answers.sequences import AnsweredPrompt, make_batch, plan_batches  # noqa: E402
from medusa_deploy.calibration.distributions import kl_divergence, log_softmax  # noqa: E402
from medusa_deploy.calibration.training.examples import IGNORE  # noqa: E402
from medusa_deploy.calibration.training.finetune import FinetuneConfig, Tuned, finetune  # noqa: E402
from medusa_deploy.calibration.training.kl_loss import kl_loss  # noqa: E402
from medusa_deploy.calibration.training.quality import perplexity  # noqa: E402
from medusa_deploy.export.backbone.adapter import backbone_digest, merge_adapter  # noqa: E402
from medusa_deploy.export.backbone.backbone import load_module  # noqa: E402
from medusa_deploy.runtime.errors import HeadsError, HeadsMismatchError, TrainingError  # noqa: E402
from medusa_deploy.runtime.files.adapter_file import read_adapter  # noqa: E402
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet  # noqa: E402
from medusa_deploy.runtime.files.heads_file import read_heads_config, read_heads_folder, write_heads  # noqa: E402
from support.tiny import HIDDEN, VOCAB, make_tiny_model  # noqa: E402

HEADS = 2
CONFIG = FinetuneConfig(rank=4, alpha=8.0, epochs=8, batch_tokens=64, learning_rate=5e-3, dropout=0.0, checkpoint_steps=3)


def start_heads() -> HeadSet:
    """Heads that say what the backbone says, over every token."""
    tensors: dict[str, Any] = {"token_map": np.arange(VOCAB)}
    for head in range(HEADS):
        tensors[f"head.{head}.layer.0.weight"] = np.zeros((HIDDEN, 2 * HIDDEN), np.float16)
        tensors[f"head.{head}.layer.0.bias"] = np.zeros(HIDDEN, np.float16)
    return HeadSet(HeadConfig("grounded", HEADS, 1, HIDDEN, VOCAB, "pruned"), tensors)


def answers(module: Any, count: int = 24) -> list[AnsweredPrompt]:
    """Greedy answers of the backbone with the hidden states behind them."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        prompt = rng.integers(3, VOCAB, 4)
        tokens, states = prompt.tolist(), []
        for _ in range(int(rng.integers(5, 9))):
            with torch.no_grad():
                state = module.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
                states.append(state.half().numpy())
                tokens.append(int(module.get_output_embeddings()(state).argmax()))
        found.append(AnsweredPrompt(prompt, np.array(tokens[4:]), np.stack(states)))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(model: Path) -> list[AnsweredPrompt]:
    return answers(load_module(model, "fp32"))


def tune(model: Path, data: list[AnsweredPrompt], config: FinetuneConfig = CONFIG, **options: Any) -> tuple[Any, Tuned]:
    module = load_module(model, "fp32")
    return module, finetune(module, backbone_digest(module), start_heads(), data, config, **options)


@pytest.fixture(scope="module")
def tuned(model: Path, data: list[AnsweredPrompt]) -> tuple[Any, Tuned]:
    return tune(model, data)


def test_labels_are_the_tokens_after_the_one_emitted() -> None:
    sequence = AnsweredPrompt(np.array([7, 8]), np.array([10, 11, 12]), np.zeros((3, 4), np.float16))
    shorter = AnsweredPrompt(np.array([5]), np.array([20]), np.zeros((1, 4), np.float16))
    batch = make_batch([shorter, sequence], 2)
    assert batch.ids.tolist() == [[5, 0, 0, 0], [7, 8, 10, 11]]
    # The last prompt token emits the first answer token: position 1 of the second sequence emits 10.
    assert batch.rows.tolist() == [0, 5, 6, 7]
    assert batch.roots.tolist() == [20, 10, 11, 12]
    assert batch.labels.tolist() == [[IGNORE, IGNORE], [11, 12], [12, IGNORE], [IGNORE, IGNORE]]


def test_every_sequence_is_in_one_batch_of_bounded_size() -> None:
    lengths = np.random.default_rng(1).integers(2, 40, 200).tolist()
    batches = plan_batches(lengths, 128, seed=3)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 128 for batch in batches)
    assert batches != plan_batches(lengths, 128, seed=4)


def test_divergence_equals_torch_and_so_does_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, teacher, weight = torch.randn(600, 8, requires_grad=True), torch.randn(600, 8), torch.randn(30, 8)
    found = kl_loss(hidden, teacher, weight)
    (gradient,) = torch.autograd.grad(found, hidden)
    logits, expected = hidden @ weight.T, (teacher @ weight.T).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    assert torch.allclose(found, wanted, atol=1e-5)
    in_numpy = kl_divergence(*(log_softmax((rows @ weight.T).detach().numpy()) for rows in (teacher, hidden)))
    assert in_numpy.shape == (600,)
    assert found.item() == pytest.approx(in_numpy.mean(), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, hidden)[0], atol=1e-6)


def test_divergence_of_capped_logits_equals_torch_and_so_does_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, teacher, weight = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8), torch.randn(30, 8)

    def change(logits: Any) -> Any:
        return torch.tanh(logits * 2 / 3) * 3

    found = kl_loss(hidden, teacher, weight, change=change)
    (gradient,) = torch.autograd.grad(found, hidden)
    logits, expected = change(hidden @ weight.T), change(teacher @ weight.T).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, hidden)[0], atol=1e-6)


def test_the_backbone_is_itself_at_the_start(model: Path, data: list[AnsweredPrompt]) -> None:
    _, result = tune(model, data, replace(CONFIG, learning_rate=1e-12, epochs=1))
    assert abs(result.curve[0]["divergence"]) < 1e-4  # hidden states are kept in half precision


def test_heads_learn_and_the_frozen_weights_stay(model: Path, tuned: tuple[Any, Tuned]) -> None:
    module, result = tuned
    first, last = result.curve[0]["head_losses"], result.curve[-1]["head_losses"]
    assert sum(last) < 0.85 * sum(first)
    before = load_module(model, "fp32").state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in module.state_dict().items() if "lora" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_interrupted_run_ends_in_the_same_heads_and_adapter_but_for_rounding(
    model: Path, data: list[AnsweredPrompt], tuned: tuple[Any, Tuned], tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(report: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        tune(model, data, checkpoint=tmp_path / "run.pt", progress=stop)
    assert (tmp_path / "run.pt").exists()
    _, again = tune(model, data, checkpoint=tmp_path / "run.pt")
    for name, tensor in tuned[1].heads.tensors.items():
        assert np.allclose(again.heads.tensors[name], tensor, atol=5e-3), name
    expected, found = load(tuned[1].adapter.weights), load(again.adapter.weights)
    assert all(torch.allclose(found[name], tensor, atol=5e-3) for name, tensor in expected.items())
    assert any(tensor.abs().max() > 0.05 for tensor in expected.values())
    with pytest.raises(TrainingError, match="other settings: .*rank"):
        tune(model, data, replace(CONFIG, rank=2), checkpoint=tmp_path / "run.pt")


def test_a_time_limit_ends_the_run(model: Path, data: list[AnsweredPrompt]) -> None:
    _, result = tune(model, data, replace(CONFIG, time_limit=1e-9))
    assert result.curve[-1]["step"] <= 1


def test_the_merged_backbone_computes_what_the_tuned_one_does(model: Path, tuned: tuple[Any, Tuned], tmp_path: Path) -> None:
    module, result = tuned
    write_heads(result.heads, tmp_path / "heads", adapter=result.adapter)
    adapter = read_adapter(tmp_path / "heads", read_heads_config(tmp_path / "heads"))
    assert adapter is not None
    original = load_module(model, "fp32")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, before = module(input_ids=ids).logits, original(input_ids=ids).logits
        merged = merge_adapter(original, adapter)(input_ids=ids).logits
    assert (expected - before).abs().max() > 0.05
    assert torch.allclose(merged, expected, atol=0.02)  # the file holds half precision


def test_heads_without_their_adapter_or_with_another_are_refused(model: Path, tuned: tuple[Any, Tuned], tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    write_heads(tuned[1].heads, folder, adapter=tuned[1].adapter)
    adapter = read_adapter(folder, read_heads_config(folder))
    assert adapter is not None
    other = load_module(make_tiny_model(tmp_path / "other", seed=1), "fp32")
    with pytest.raises(HeadsMismatchError, match="digest"):
        merge_adapter(other, adapter)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(HeadsError, match="sha256"):
        read_heads_folder(folder)
    weights.unlink()
    with pytest.raises(HeadsError, match="is missing"):
        read_heads_folder(folder)


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"learning_rate": math.nan}, {"kl_share": 0.0}, {"time_limit": -1.0}, {"dropout": 1.0}]
)
def test_impossible_settings_are_refused(model: Path, data: list[AnsweredPrompt], change: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(change))):
        tune(model, data, replace(CONFIG, **change))


def test_a_diverging_run_is_stopped(model: Path, data: list[AnsweredPrompt]) -> None:
    broken = [replace(sequence, hidden=np.full_like(sequence.hidden, np.inf)) for sequence in data]
    with pytest.raises(TrainingError, match="step 1"):
        tune(model, broken)


def test_perplexity_is_that_of_the_predicted_tokens_alone(model: Path) -> None:
    module, tokens = load_module(model, "fp32"), [5, 9, 30, 77]
    with torch.no_grad():
        scores = module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = math.exp(-(scores[1, 30] + scores[2, 77]).item() / 2)
    assert perplexity(module, [(tokens, 2), ([4], 1)]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TrainingError):
        perplexity(module, [([4], 1)])
