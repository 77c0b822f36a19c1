"""The torch reference of the step against the exported step graph: same weights, same caches, same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Session, Tree, load
from medusa_deploy.runtime.backends import ort_model
from medusa_deploy.runtime.executors.one_slot import prefill_rows
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor
from medusa_deploy.runtime.executors.step_arrays import StepInputs, StepOutputs
from medusa_deploy.runtime.executors.step_plan import SlotRows, rows_to_move
from support.plans import EVERYTHING
from support.tiny import HEADS, VOCAB, tiny_head_set
from support.trees import random_tree

torch = pytest.importorskip("torch")
from medusa_deploy.tools.gpu_check.shapes import SIZES, Shapes  # noqa: E402
from medusa_deploy.tools.gpu_check.torch_reference.attention import fused_attention, product_attention  # noqa: E402
from medusa_deploy.tools.gpu_check.torch_reference.loop import Loop, generate  # noqa: E402
from medusa_deploy.tools.gpu_check.torch_reference.step import Inputs, TorchStep, empty_caches  # noqa: E402
from medusa_deploy.tools.gpu_check.torch_reference.weights import (  # noqa: E402
    PROJECTIONS,
    heads_of,
    random_heads,
    random_weights,
    weights_of,
)
from medusa_deploy.tools.sizing.model_sizes import ModelShape  # noqa: E402

ATTENTIONS = [fused_attention, product_attention]
TINY = Shapes("support", ModelShape("LlamaForCausalLM", 2, 64, 4, 2, 16, VOCAB, 128, 512))


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, slots=2, threads=1, variant="standard")


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> Any:
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(tiny_model)
    return weights_of(model.state_dict(), TINY)


def step_of(weights: Any, session: Session, slots: int, **options: Any) -> TorchStep:
    return TorchStep(weights, empty_caches(weights, slots, session.manifest.limits.cache_rows), HEADS, **options)


def as_inputs(inputs: StepInputs) -> Inputs:
    names = ("tokens", "positions", "ancestors", "forced", "write_index", "commit", "logit_rows")
    return Inputs(**{name: torch.from_numpy(getattr(inputs, name).copy()) for name in names})


def assert_equal(found: Any, outputs: StepOutputs, alive: np.ndarray) -> None:
    """Outputs agree; rows that are padding hold nothing."""
    np.testing.assert_allclose(found.logits.numpy()[alive], outputs.logits[alive], atol=2e-5)
    np.testing.assert_allclose(found.hidden.numpy()[alive], outputs.hidden[alive], atol=2e-5)
    np.testing.assert_array_equal(found.last_row.numpy(), outputs.last_row)
    np.testing.assert_array_equal(found.next_token.numpy(), outputs.next_token)
    np.testing.assert_array_equal(found.candidates.numpy(), outputs.candidates)
    np.testing.assert_allclose(found.log_probs.numpy(), outputs.log_probs, atol=2e-5)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_steps_are_the_step_graphs(session: Session, weights: Any, attend: Any) -> None:
    """Two slots of different lengths; trees of random tokens, some made to be right; every path is committed once."""
    rng, executor = np.random.default_rng(0), OrtDeviceExecutor(ort_model(session.bundle, 2, "standard"), "cpu", threads=1)
    step = step_of(weights, session, 2, attend=attend)
    heads = heads_of(tiny_head_set(), weights, session.manifest.heads.top_k)
    lengths = [11, 30]
    moves: list[tuple[int, ...]] = [(), ()]
    for slot, length in enumerate(lengths):
        bound = executor._bind(slot, 1, length, 1, EVERYTHING)
        bound.inputs.fill(prefill_rows(slot, rng.integers(0, VOCAB, length)), 0)
        executor._call(bound)
        alone = TorchStep(weights, [cache[slot : slot + 1] for cache in step.caches], HEADS, attend)
        assert_equal(alone.run(as_inputs(bound.inputs), 64, heads), bound.outputs, np.ones((1, 1), bool))
    for turn in range(4):
        trees = [random_tree(rng, depth=HEADS, max_rows=8) for _ in lengths]
        rows = max(tree.rows for tree in trees) + 1  # at least one row of padding
        bound = executor._bind(0, 2, rows, rows, EVERYTHING)
        inputs, outputs = bound.inputs, bound.outputs
        alive = np.zeros((2, rows), bool)
        for slot, tree in enumerate(trees):
            alive[slot, : tree.rows] = True
            inputs.fill(SlotRows(slot, rng.integers(0, VOCAB, tree.rows), tree), lengths[slot], moves[slot], slot)
            if not turn % 2:
                inputs.forced[slot] = tree.rows  # all rows count as right: the deepest path wins
        executor._call(bound)
        assert_equal(step.run(as_inputs(inputs), 128, heads), outputs, alive)
        for slot, tree in enumerate(trees):
            path = tree.row_paths[int(outputs.last_row[slot])]
            moves[slot] = rows_to_move(lengths[slot], path)
            lengths[slot] += 1 + len(path)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_the_closed_loop_emits_what_the_runtime_emits(session: Session, weights: Any, attend: Any) -> None:
    heads = heads_of(tiny_head_set(), weights, session.manifest.heads.top_k)
    wide = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
    steps = []
    for prompt in ([3, 4, 5], list(range(20, 60))):
        plain = session.generate(token_ids=prompt, max_new_tokens=40, ignore_eos=True, speculative=False)
        for tree in (ROOT_ONLY, wide):
            loop = Loop(step_of(weights, session, 1, attend=attend), tree, 128, heads if tree.rows > 1 else None)
            tokens, taken = generate(loop, prompt, 40)
            assert tokens == plain.token_ids
            steps.append(taken)
        run = session.generate(token_ids=prompt, max_new_tokens=40, ignore_eos=True, tree=wide)
        assert steps[-1] == run.stats.steps < steps[-2]


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_random_models_decode_the_same_with_and_without_heads(kind: str) -> None:
    weights = random_weights(SIZES["tiny"], "cpu", torch.float32, std=0.15)
    heads = random_heads(weights, kind, top_k=4)
    tree = Tree.from_choices([(a, *rest) for a in range(4) for rest in [(), (0,), (0, 0)]])
    caches = empty_caches(weights, 1, 128)
    step = TorchStep(weights, caches, heads.count)
    plain, _ = generate(Loop(step, ROOT_ONLY, 128), [1, 2, 3], 40)
    tokens, _ = generate(Loop(step, tree, 128, heads), [1, 2, 3], 40)
    assert tokens == plain


def test_the_parts_between_attentions_compile_once_a_size() -> None:
    """What a GPU compiles must be whole graphs that serve all layers; here it is traced and run without a code generator."""
    from torch._dynamo import testing

    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    weights = random_weights(SIZES["tiny"], "cpu", torch.float32, std=0.15)
    heads = random_heads(weights, "own", top_k=4)
    caches = empty_caches(weights, 1, 128)
    wrap = lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend=counter)  # noqa: E731
    tree = Tree.from_choices([(0,), (1,), (0, 0)])
    plain, _ = generate(Loop(TorchStep(weights, caches, 4), tree, 128, heads), [1, 2, 3], 20)
    loop = Loop(TorchStep(weights, caches, 4, wrap=wrap), tree, 128, heads)
    generate(loop, [1, 2, 3], 2)
    before = counter.frame_count
    assert generate(loop, [1, 2, 3], 20)[0] == plain
    assert counter.frame_count == before <= 10, "five parts, for the prefill and for the tree"
