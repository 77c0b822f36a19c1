"""The screened projection chooses what the whole one does, and says when it can't tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir

from medusa_deploy.export.passes import matmuls
from medusa_deploy.export.quantise import screen as screening
from medusa_deploy.export.quantise.cpu import CpuPrecision, quantise_cpu
from medusa_deploy.runtime import load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.request import Request
from medusa_deploy.runtime.sampling import SamplingParams
from medusa_deploy.runtime.session import Session
from medusa_deploy.tools.prompt_source import random_prompts
from support.graphs import opened
from support.tiny import VOCAB

SIZE, TOKENS, CHOSEN = 64, 300, "greedy"
ROUGH, REACH = "screen/MatMulNBits_output", "reach"


@contextmanager
def small_ones_too(exact: int = 8) -> Iterator[None]:
    """Screen whatever can be; the other fixtures' bundles, made in the meantime, would be screened, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "_WORTH_IT", 1)
        patch.setattr(screening, "_EXACT", exact)
        patch.setattr(matmuls, "NUMBERS_AT_A_TIME", 70 * SIZE)
        yield


def projection(weight: np.ndarray, *, tied: bool) -> Any:
    """A graph of a projection and its greedy choice alone."""
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0])] if tied else []
    nodes.append(make.make_node("MatMul", ["hidden", "turned" if tied else "weight"], [step_io.LOGITS], name="projection"))
    nodes.append(make.make_node("ArgMax", [step_io.LOGITS], [CHOSEN], axis=-1, keepdims=0, name="choice"))
    graph = make.make_graph(
        nodes,
        "projection",
        [make.make_tensor_value_info("hidden", float32, ["B", "R", weight.shape[1]])],
        [
            make.make_tensor_value_info(step_io.LOGITS, float32, ["B", "R", len(weight)]),
            make.make_tensor_value_info(CHOSEN, onnx.TensorProto.INT64, ["B", "R"]),
        ],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight if tied else weight.T), "weight")],
    )
    return ir.from_proto(make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10))


class Screened:
    """A screened projection, run."""

    def __init__(self, weight: np.ndarray, *, tied: bool = True) -> None:
        self.weight = weight
        self.model = projection(weight, tied=tied)
        with small_ones_too():
            screening.screen(self.model)
        by_name = {node.name: node for node in self.model.graph}
        reach = next(node.inputs[1] for name, node in by_name.items() if name.startswith("screen/Add"))
        self._reach = str(reach.name)
        proto = ir.to_proto(self.model)
        for name in (ROUGH, self._reach):
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self._session = opened(proto)

    def run(self, hidden: np.ndarray, *, wanted: bool = False) -> dict[str, np.ndarray]:
        """``hidden`` [R, H]; the results are of its rows."""
        feeds = {"hidden": hidden[None], step_io.LOGITS_WANTED: np.array(wanted)}
        names = [step_io.LOGITS, CHOSEN, ROUGH, self._reach]
        found = dict(zip(names, self._session.run(names, feeds), strict=True))
        return {"logits": found[step_io.LOGITS], CHOSEN: found[CHOSEN][0], ROUGH: found[ROUGH][0], REACH: found[self._reach][0]}


def exact(weight: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Logits [R, V]."""
    result: np.ndarray = hidden.astype(np.float64) @ weight.astype(np.float64).T
    return result


def random_weight(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(TOKENS, SIZE)) * np.exp(rng.normal(size=(TOKENS, 1)))
    return weight.astype(np.float32)


@pytest.fixture(scope="module")
def screened() -> dict[bool, Screened]:
    return {tied: Screened(random_weight(3), tied=tied) for tied in (True, False)}


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), outlier=st.sampled_from([1.0, 30.0, 1000.0]), tied=st.booleans())
@settings(deadline=None, max_examples=60)
def test_bounds_hold_and_the_choice_is_that_of_the_whole_projection(
    screened: dict[bool, Screened], seed: int, rows: int, outlier: float, tied: bool
):
    """Inputs that rounding hurts most: one channel outweighs the others of its block."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, SIZE)).astype(np.float32)
    hidden[:, rng.integers(SIZE)] *= outlier
    one = screened[tied]
    found, logits = one.run(hidden), exact(one.weight, hidden)
    assert (np.abs(found[ROUGH] - logits) <= found[REACH]).all()
    best = np.sort(logits, -1)
    clear = best[:, -1] - best[:, -2] > 1e-4
    assert (found[CHOSEN] == logits.argmax(-1))[clear].all()


def test_a_dry_run_counts_what_is_added(screened: dict[bool, Screened]):
    with small_ones_too():
        size = screening.screen_size((TOKENS, SIZE))
    for one in screened.values():
        initializers = one.model.graph.initializers.values()
        added = sum(value.const_value.nbytes for value in initializers if value.name.startswith("screen/"))
        assert size <= added < size + 256, "and a few constants of the nodes around it"
    assert screening.screen_size((TOKENS, SIZE)) == 0, "too small to be screened"


def test_a_clear_choice_reads_no_logits_and_a_close_one_all(screened: dict[bool, Screened]):
    one = screened[True]
    clear = 4 * one.weight[[7, 200]] / np.linalg.norm(one.weight[[7, 200]], axis=1, keepdims=True)
    aligned = exact(one.weight, clear).argmax(-1)
    assert one.run(clear)["logits"].size == 0
    assert one.run(clear)[CHOSEN].tolist() == aligned.tolist()
    nothing = np.zeros_like(clear)  # all logits are 0: no bound lies below another
    found = one.run(nothing)
    assert found["logits"].shape == (1, 2, TOKENS) and found[CHOSEN].tolist() == [0, 0]


def test_tokens_too_many_to_compute_are_told_apart_by_the_whole_projection():
    rng = np.random.default_rng(1)
    weight = np.repeat(rng.normal(size=(1, SIZE)), TOKENS, 0) + 1e-3 * rng.normal(size=(TOKENS, SIZE))
    one = Screened(weight.astype(np.float32))
    hidden = weight[:1].astype(np.float32) + 0.1 * rng.normal(size=(6, SIZE)).astype(np.float32)
    found = one.run(hidden)
    assert found["logits"].size and found[CHOSEN].tolist() == exact(one.weight, hidden).argmax(-1).tolist()
    rough = found[ROUGH].argmax(-1)
    assert rough.tolist() != found[CHOSEN].tolist(), "8 bits alone would have chosen otherwise"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_whole_where_they_are_wanted(screened: dict[bool, Screened], tied: bool):
    hidden = np.random.default_rng(5).normal(size=(3, SIZE)).astype(np.float32)
    found = screened[tied].run(hidden, wanted=True)
    np.testing.assert_allclose(found["logits"][0], exact(screened[tied].weight, hidden), atol=1e-3)


def test_weights_on_the_grid_are_bounded_by_what_is_rounded_of_activations_alone():
    """Those of a Q8_0 file are."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (TOKENS, SIZE))
    codes[:, ::32] = 127
    one = Screened((codes * np.float32(0.001)).astype(np.float32))
    kinds = Counter(node.op_type for node in one.model.graph)
    assert kinds["ReduceL2"] == 1 and kinds["Concat"] == 0
    hidden = rng.normal(size=(4, SIZE)).astype(np.float32)
    found = one.run(hidden)
    assert (np.abs(found[ROUGH] - exact(one.weight, hidden)) <= found[REACH]).all()


@pytest.mark.parametrize("tied", [True, False])
def test_screening_can_be_taken_back(tied: bool):
    model = projection(random_weight(4), tied=tied)
    before = ir.to_proto(model)
    with small_ones_too():
        screening.screen(model)
    assert [value.name for value in model.graph.inputs] == ["hidden", step_io.LOGITS_WANTED]
    screening.unscreen(model)
    after = ir.to_proto(model)
    assert [value.name for value in after.graph.input] == ["hidden"]
    assert [value.name for value in after.graph.output] == [step_io.LOGITS, CHOSEN]
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert [value.name for value in after.graph.initializer] == ["weight"]
    hidden = np.random.default_rng(6).normal(size=(1, 2, SIZE)).astype(np.float32)
    results = [opened(graph).run(None, {"hidden": hidden}) for graph in (before, after)]
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_what_is_small_or_narrow_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    for weight, least in ((random_weight(1), TOKENS * SIZE + 1), (random_weight(1)[:, :40], 1)):
        monkeypatch.setattr(screening, "_WORTH_IT", least)
        model = projection(np.ascontiguousarray(weight), tied=True)
        screening.screen(model)
        assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "ArgMax"]


# -- in a bundle ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screened_bundle(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medusa_deploy.export.exporter import export_bundle

    output = tmp_path_factory.mktemp("screened") / "bundle"
    with small_ones_too(16):
        export_bundle(tiny_model, tiny_heads, output, capacity=256, batch=4, top_k=4, max_rows=16, prefill_chunk=16)
    return output


def test_a_screened_bundle_says_what_the_whole_one_does(screened_bundle: Path, tiny_session: Session):
    session = load(screened_bundle, threads=1)
    graph = onnx.load(screened_bundle / "onnx/step.cpu.onnx", load_external_data=False).graph
    assert step_io.LOGITS_WANTED in {value.name for value in graph.input}
    for prompt in random_prompts(VOCAB, 256, 4, seed=9):
        for speculative in (True, False):
            options = {"token_ids": prompt, "max_new_tokens": 40, "speculative": speculative}
            assert session.generate(**options).token_ids == tiny_session.generate(**options).token_ids


def test_several_slots_decode_plainly_as_one_does(screened_bundle: Path, tiny_session: Session):
    session = load(screened_bundle, slots=4, variant="cpu", threads=1)
    prompts = random_prompts(VOCAB, 256, 3, seed=2)
    for index, found in session.generate_many([Request(token_ids=prompt, max_new_tokens=20) for prompt in prompts]):
        assert found.token_ids == tiny_session.generate(token_ids=prompts[index], max_new_tokens=20).token_ids


def test_sampling_reads_the_whole_projection(screened_bundle: Path, tiny_session: Session):
    params = SamplingParams("sample", temperature=0.9, seed=4)
    options = {"token_ids": list(range(9)), "max_new_tokens": 30, "params": params}
    assert load(screened_bundle, threads=1).generate(**options).token_ids == tiny_session.generate(**options).token_ids


def test_a_screened_graph_is_quantised_like_a_whole_one(screened_bundle: Path, tiny_bundle: Path):
    found = []
    for bundle in (screened_bundle, tiny_bundle):
        model = screening.load_whole(bundle / "onnx/step.cpu.onnx")
        report = quantise_cpu(model, CpuPrecision())
        kinds = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
        found.append((dict(report.bits), report.after, kinds, {value.name for value in model.graph.inputs}))
    assert found[0] == found[1]
