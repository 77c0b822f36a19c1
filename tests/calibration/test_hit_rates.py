"""Hit rates: counted as a loop would, equal to what decoding accepts, from one arithmetic in three places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Session, Tree
from medusa_deploy.runtime.drafting.hits import MISS, NO_LABEL, path_rates
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet
from medusa_deploy.runtime.files.heads_file import read_heads_folder
from medusa_deploy.runtime.tree import tree_of_paths
from medusa_deploy.tools.measure.hit_table import count_hits
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import HEADS, HIDDEN, VOCAB, tiny_head_set

torch: Any = pytest.importorskip("torch")

from medusa_deploy.calibration.hit_rates import (  # noqa: E402
    Hits,
    draft_projection,
    find_hits,
    head_logits,
)
from medusa_deploy.calibration.training.examples import IGNORE, Examples, following_tokens  # noqa: E402
from medusa_deploy.calibration.training.trainable import TrainableHeads  # noqa: E402
from medusa_deploy.export.backbone.logits import LogitChange  # noqa: E402
from medusa_deploy.export.heads.module import HeadStack  # noqa: E402
from support.learnable import hit_rates  # noqa: E402

_V, _H, _K = 20, 8, 2


def _random_heads(rng: np.random.Generator, kind: Any, projection: Any, *, layers: int = 1) -> HeadSet:
    size = 9 if projection == "pruned" else _V
    tensors: dict[str, np.ndarray] = {}
    for head in range(_K):
        for layer in range(layers):
            width = 2 * _H if kind == "grounded" and layer == 0 else _H
            tensors[f"head.{head}.layer.{layer}.weight"] = rng.normal(size=(_H, width)).astype(np.float32)
            tensors[f"head.{head}.layer.{layer}.bias"] = rng.normal(size=_H).astype(np.float32)
        if projection == "own":
            tensors[f"head.{head}.projection.weight"] = rng.normal(size=(size, _H)).astype(np.float32)
    if projection == "pruned":
        tensors["token_map"] = np.sort(rng.permutation(_V)[:size])
    heads = HeadSet(HeadConfig(kind, _K, layers, _H, size, projection), tensors)
    heads.validate()
    return heads


def _naive_logits(heads: HeadSet, head: int, hidden: np.ndarray, root: np.ndarray, output_weight: np.ndarray) -> np.ndarray:
    """Draft logits [V'] of one position, in float64."""
    x = hidden.astype(np.float64)
    for layer in range(heads.config.num_layers):
        weight, bias = heads.layer(head, layer)
        source = np.concatenate([x, root]) if heads.config.kind == "grounded" and layer == 0 else x
        y = weight.astype(np.float64) @ source + bias
        x = x + y / (1 + np.exp(-y))
    own = heads.tensors.get(f"head.{head}.projection.weight")
    kept = output_weight if heads.token_map is None else output_weight[heads.token_map]
    return np.asarray((kept if own is None else own) @ x)


@pytest.mark.parametrize("projection", ["pruned", "shared", "own"])
@pytest.mark.parametrize("kind", ["medusa", "grounded"])
def test_hit_rates_are_what_a_loop_counts(kind: str, projection: str) -> None:
    rng = np.random.default_rng(0)
    heads, ranks, count = _random_heads(rng, kind, projection, layers=2), 4, 50
    embedding, output_weight = (rng.normal(size=(_V, _H)).astype(np.float32) for _ in range(2))
    hidden, roots = rng.normal(size=(count, _H)).astype(np.float32), rng.integers(0, _V, count)
    labels = rng.integers(0, _V, (count, _K))
    labels[rng.random((count, _K)) < 0.2] = IGNORE
    expected = np.zeros((_K, ranks))
    for head in range(_K):
        labelled = [row for row in range(count) if labels[row, head] != IGNORE]
        for row in labelled:
            order = np.argsort(-_naive_logits(heads, head, hidden[row], embedding[roots[row]], output_weight))[:ranks]
            tokens = order if heads.token_map is None else heads.token_map[order]
            expected[head] += (tokens == labels[row, head]) / len(labelled)
    data = Examples(torch.from_numpy(hidden), torch.from_numpy(roots), torch.from_numpy(labels))
    found = hit_rates(heads, data, torch.from_numpy(embedding), torch.from_numpy(output_weight), ranks=ranks, batch=16)
    np.testing.assert_allclose(found, expected, atol=1e-12)


# -- one arithmetic, three places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["medusa", "grounded"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_trained_exported_and_counted_heads_compute_the_same(cap: float | None, kind: Any, layers: int) -> None:
    torch.manual_seed(0)
    change = LogitChange(0.5, cap)
    embedding, output_weight = torch.randn(_V, _H), torch.randn(_V, _H)
    token_map = torch.tensor([1, 2, 3, 5, 8, 13])
    config = HeadConfig(kind, _K, layers, _H, len(token_map), "pruned")
    sizes = [2.0 ** torch.randint(-3, 4, (_H,)) for _ in range(2)]  # powers of two: half precision keeps the quotients
    trained = TrainableHeads(config, embedding, output_weight[token_map], *sizes, change=change).eval()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
        parameter.data = parameter.data.half().float()  # what the record keeps of it
    heads = trained.export(token_map)
    hidden, roots = torch.randn(7, _H), torch.randint(0, _V, (7,))
    with torch.no_grad():
        from_training = torch.stack(trained(hidden, roots), 1)  # [n, K, V']
        projections = [draft_projection(heads, head, output_weight) for head in range(_K)]
        counted = torch.stack([head_logits(heads, head, hidden, embedding[roots], projections[head]) for head in range(_K)], 1)
        output = torch.nn.Linear(_H, _V, bias=False)
        output.weight = torch.nn.Parameter(output_weight)
        exported = HeadStack(heads, output, top_k=4, dtype=torch.float32, change=change)
        candidates, log_probs = exported(hidden[:, None], embedding[roots][:, None])
    torch.testing.assert_close(change(counted), from_training)
    best = from_training.log_softmax(-1).topk(4, -1)
    torch.testing.assert_close(log_probs, best.values)
    assert torch.equal(candidates, token_map[best.indices])
    labels = token_map[best.indices[:, :, 0]]  # of every position, so each head is right at rank 0
    hits = find_hits(heads, Examples(hidden, roots, labels), embedding, output_weight, ranks=4, change=change)
    assert not hits.ranks.any()
    np.testing.assert_allclose(hits.log_probs, best.values.numpy(), rtol=1e-4, atol=1e-5)


# -- what decoding accepts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer(tiny_session: Session) -> tuple[list[int], np.ndarray]:
    """Tokens and hidden states of one plain answer."""
    generation = tiny_session.generate(
        token_ids=[44, 7, 100], max_new_tokens=200, ignore_eos=True, tree=ROOT_ONLY, keep_hidden=True
    )
    assert generation.hidden is not None
    return generation.token_ids, generation.hidden


@pytest.fixture(scope="module")
def hits(answer: tuple[list[int], np.ndarray], tiny_model: Path, tiny_heads: Path) -> np.ndarray:
    """Bool [n, K, 4]: whether the candidate of rank r of head h at a position is the token that follows."""
    from transformers import LlamaForCausalLM

    tokens, hidden = answer
    model: Any = LlamaForCausalLM.from_pretrained(tiny_model)
    weight = model.get_output_embeddings().weight.detach()
    heads = read_heads_folder(tiny_heads)
    padded = np.array([*tokens[1:], *[IGNORE] * HEADS])
    labels = np.lib.stride_tricks.sliding_window_view(padded, HEADS)[: len(tokens)]
    whole = Examples(torch.from_numpy(hidden), torch.tensor(tokens), torch.from_numpy(labels.copy()))
    each = np.stack(
        [
            hit_rates(
                heads, Examples(whole.hidden[i : i + 1], whole.roots[i : i + 1], whole.labels[i : i + 1]), weight, weight, ranks=4
            )
            for i in range(len(tokens))
        ]
    )
    rates = hit_rates(heads, whole, weight, weight, ranks=4)
    labelled = (labels != IGNORE).sum(0)
    np.testing.assert_allclose(rates, each.sum(0) / labelled[:, None])
    assert weight.shape == (VOCAB, HIDDEN)
    return each > 0.5


@pytest.mark.parametrize(
    "choices", [[(0,)], [(1,)], [(0,), (0, 0), (0, 0, 0)], [(0,), (1,), (0, 1), (1, 0)], [(3,), (2,), (2, 0), (2, 0, 1)]]
)
def test_decoding_accepts_what_the_hit_rates_count(
    tiny_session: Session, answer: tuple[list[int], np.ndarray], hits: np.ndarray, choices: list[tuple[int, ...]]
) -> None:
    tree, (tokens, _) = Tree.from_choices(choices), answer
    accepted: dict[int, int] = {}
    position = 0
    while position < len(tokens) - 1:
        depths = [len(path) for path in tree.paths if all(hits[position, head, rank] for head, rank in enumerate(path))]
        accepted[max(depths)] = accepted.get(max(depths), 0) + 1
        position += 1 + max(depths)
    generation = tiny_session.generate(token_ids=[44, 7, 100], max_new_tokens=len(tokens), ignore_eos=True, tree=tree)
    assert generation.token_ids == tokens
    # The last step may accept drafts past the end, where there is no label to count.
    missed = {count: generation.stats.accepted.get(count, 0) - accepted.get(count, 0) for count in range(tree.depth + 1)}
    assert generation.stats.steps == sum(accepted.values())
    assert sum(abs(difference) for difference in missed.values()) in (0, 2)
    assert len(generation.stats.accepted) > 1 or choices == [(3,), (2,), (2, 0), (2, 0, 1)]


@pytest.fixture(scope="module", params=["medusa shared", "grounded pruned"])
def pair(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, HeadSet]:
    """A session over the tiny model, and its heads, neither of them rounded."""
    from medusa_deploy.export.exporter import export_bundle
    from medusa_deploy.runtime import load
    from medusa_deploy.runtime.files.heads_file import write_heads

    heads = tiny_head_set()
    if request.param == "grounded pruned":
        rng = np.random.default_rng(1)
        config = HeadConfig("grounded", HEADS, 1, HIDDEN, 96, "pruned")
        wider = {f"head.{h}.layer.0.weight": rng.normal(0, 0.05, (HIDDEN, 2 * HIDDEN)).astype(np.float32) for h in range(HEADS)}
        heads = HeadSet(config, {**heads.tensors, **wider, "token_map": np.sort(rng.permutation(VOCAB)[:96])})
    folder = tmp_path_factory.mktemp("pair")
    write_heads(heads, folder / "heads")
    export_bundle(tiny_model, folder / "heads", folder / "bundle", capacity=256, top_k=4, max_rows=16, prefill_chunk=16)
    return load(folder / "bundle", threads=1, variant="standard"), heads


def test_the_engine_counts_the_ranks_that_torch_computes(pair: tuple[Session, HeadSet], tiny_model: Path) -> None:
    """What ``tree`` counts while the bundle decodes, against the torch module fed with the whole text at once."""
    from transformers import LlamaForCausalLM

    session, heads = pair
    prompts = random_prompts(VOCAB, 256, 4, seed=7)
    counted = count_hits(session, prompts, 48).ranks
    model: Any = LlamaForCausalLM.from_pretrained(tiny_model)
    weight = model.get_output_embeddings().weight.detach()
    hidden, roots, labels = [], [], []
    for prompt in prompts:
        tokens = np.array(session.generate(token_ids=prompt, max_new_tokens=48, speculative=False).token_ids)
        with torch.no_grad():
            states = model(torch.tensor([[*prompt, *tokens[:-1]]]), output_hidden_states=True).hidden_states[-1][0]
        hidden.append(states[len(prompt) - 1 :])
        roots.append(torch.from_numpy(tokens))
        labels.append(torch.from_numpy(following_tokens(tokens, HEADS).copy()))
    computed = find_hits(heads, Examples(torch.cat(hidden), torch.cat(roots), torch.cat(labels)), weight, weight, ranks=4).ranks
    assert counted is not None
    np.testing.assert_array_equal(counted, computed)
    assert {MISS, NO_LABEL, 0, 1, 2, 3} <= {*computed.ravel().tolist()}


def test_rates_fall_with_the_rank_of_a_trained_head() -> None:
    from medusa_deploy.calibration.training.train import train_heads
    from support.learnable import CONFIG, backbone, examples

    data = examples(640)
    noisy = Examples(
        data.hidden + 2 * torch.randn(data.hidden.shape, generator=torch.Generator().manual_seed(0)).half(),
        data.roots,
        data.labels,
    )
    heads = train_heads(noisy, *backbone(), replace(CONFIG, epochs=12))
    rates = hit_rates(heads, noisy, *backbone(), ranks=4)
    assert (np.diff(rates, axis=1) < 0).all()
    assert (rates.sum(1) <= 1).all()


def ranked(ranks: np.ndarray) -> Hits:
    return Hits(ranks, np.zeros((*ranks.shape, 1), np.float32))


def test_paths_are_counted_as_far_as_every_head_was_right() -> None:
    found = np.array([[0, 0, 1], [0, 0, MISS], [0, MISS, 0], [1, 0, NO_LABEL], [MISS, 0, 0], [NO_LABEL, NO_LABEL, NO_LABEL]])
    assert path_rates(found) == {(0,): 3 / 5, (0, 0): 2 / 5, (0, 0, 1): 1 / 5, (1,): 1 / 5, (1, 0): 1 / 5}


def test_a_tree_of_counted_paths_promises_what_decoding_accepts_on_average() -> None:
    """Summed over positions: the deepest path of the tree that is right there."""
    found = np.random.default_rng(0).integers(MISS, 3, (500, 3))
    rates = path_rates(found)
    tree = tree_of_paths(rates, 8)
    accepted = [max(len(path) for path in tree.paths if all(row[: len(path)] == path)) for row in found]
    assert sum(rates[path] for path in tree.paths[1:]) == pytest.approx(np.mean(accepted))
