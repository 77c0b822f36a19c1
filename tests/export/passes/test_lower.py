"""What a bundle's graphs are made of: standard operators for engines, the fused one for the CPU, caches written in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import Session, load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.step_plan import rows_to_move
from medusa_deploy.runtime.tree import Tree
from support.plans import EVERYTHING, prefill, verify
from support.tiny import HEADS, VOCAB

onnx: Any = pytest.importorskip("onnx")

LAYERS, OPSET = 2, 24


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path) -> dict[str, Any]:
    names = {"standard": "step.onnx", "cpu": "step.cpu.onnx", "device": "step.device.onnx", "heads": "heads.onnx"}
    return {variant: onnx.load(tiny_bundle / "onnx" / name, load_external_data=False) for variant, name in names.items()}


@pytest.mark.parametrize("name", ["step.onnx", "step.device.onnx", "heads.onnx"])
def test_a_graph_for_engines_is_valid_and_standard(tiny_bundle: Path, name: str) -> None:
    path = tiny_bundle / "onnx" / name
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", OPSET)}
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


def test_the_cpu_graph_adds_one_fused_attention_and_two_norms_a_layer(graphs: dict[str, Any]) -> None:
    fused = Counter(node.op_type for node in graphs["cpu"].graph.node if node.domain == "com.microsoft")
    assert fused == {"GroupQueryAttention": LAYERS, "SkipSimplifiedLayerNormalization": 2 * LAYERS}
    assert {node.domain for node in graphs["cpu"].graph.node} == {"", "com.microsoft"}
    assert not {"Attention", "TensorScatter"} & {node.op_type for node in graphs["cpu"].graph.node}


def test_inputs_and_outputs_are_the_documented_ones(graphs: dict[str, Any]) -> None:
    outputs = [step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS, step_io.LOGITS, step_io.HIDDEN]
    outputs += step_io.present_names(LAYERS)
    inputs = [step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.COLUMNS]
    inputs += [step_io.LOGIT_ROWS, step_io.COMMIT, *step_io.past_names(LAYERS)]
    cpu = [step_io.TOKENS, step_io.POSITIONS, step_io.LOGIT_ROWS, *step_io.past_names(LAYERS)]
    cpu += [step_io.MASK, *step_io.CPU_INPUTS, step_io.HEADS_WANTED]
    for variant, expected in (("standard", inputs), ("cpu", cpu)):
        graph = graphs[variant].graph
        assert [value.name for value in graph.input] == expected
        assert [value.name for value in graph.output] == outputs


def test_each_cache_goes_through_one_gather_and_one_scatter(graphs: dict[str, Any]) -> None:
    graph = graphs["standard"].graph
    for past, present in zip(step_io.past_names(LAYERS), step_io.present_names(LAYERS), strict=True):
        readers = [node for node in graph.node if past in node.input]
        assert sorted(node.op_type for node in readers) == ["GatherElements", "TensorScatter"]
        (scatter,) = (node for node in readers if node.op_type == "TensorScatter")
        assert scatter.input[0] == past, "a cache goes from the graph's input straight to TensorScatter"
        assert list(scatter.output) == [present], "what was scattered is the graph's output itself"


def test_the_device_graph_has_the_documented_inputs_and_outputs(graphs: dict[str, Any]) -> None:
    graph = graphs["device"].graph
    inputs = [step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.COLUMNS]
    inputs += [step_io.LOGIT_ROWS, step_io.KEPT, step_io.KEPT_COUNT, step_io.DRAFT_SLOTS]
    outputs = [step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS, step_io.LOGITS, step_io.HIDDEN]
    assert [value.name for value in graph.input] == [
        *inputs, *step_io.past_names(LAYERS), step_io.HEAD_ROWS, *step_io.carried_names(LAYERS)
    ]  # fmt: skip
    present = [*step_io.CLOSING, *step_io.present_names(LAYERS), step_io.STATE_SUM, *step_io.new_names(LAYERS)]
    assert [value.name for value in graph.output] == outputs + present


def test_no_node_of_the_device_graph_reads_a_cache_but_the_one_that_writes_it(graphs: dict[str, Any]) -> None:
    graph = graphs["device"].graph
    for past, present in zip(step_io.past_names(LAYERS), step_io.present_names(LAYERS), strict=True):
        (scatter,) = (node for node in graph.node if past in node.input)
        assert (scatter.op_type, scatter.input[0], list(scatter.output)) == ("TensorScatter", past, [present])


def test_each_cache_of_the_cpu_graph_is_read_and_written_by_the_fused_operator(graphs: dict[str, Any]) -> None:
    graph = graphs["cpu"].graph
    for index, (past, present) in enumerate(zip(step_io.past_names(LAYERS), step_io.present_names(LAYERS), strict=True)):
        (reader,) = (node for node in graph.node if past in node.input)
        assert (reader.op_type, list(reader.input).index(past)) == ("GroupQueryAttention", 3 + index % 2)
        assert list(reader.output).index(present) == 1 + index % 2


def test_only_caches_have_a_fixed_length(graphs: dict[str, Any]) -> None:
    for variant in ("standard", "cpu"):
        for value in graphs[variant].graph.input:
            sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            if value.name.startswith("past"):
                assert isinstance(sizes[0], str) and all(isinstance(size, int) for size in sizes[1:])
            else:
                fixed = {axis: size for axis, size in enumerate(sizes) if isinstance(size, int)}
                assert fixed == {step_io.COMMIT: {1: HEADS}, step_io.MASK: {1: 1}}.get(value.name, {}), value.name


# -- both graphs compute the same ----------------------------------------------------------------------------------


def test_both_graphs_agree_on_random_steps(tiny_bundle: Path, tiny_session: Session) -> None:
    executors = {"cpu": tiny_session.executor, "standard": load(tiny_bundle, threads=1, variant="standard").executor}
    rng = np.random.default_rng(0)
    tree = Tree.from_choices([(branch, *(0,) * depth) for branch in range(3) for depth in range(HEADS)])
    for length in (1, 9, 40, 200):
        prompt, path = rng.integers(0, VOCAB, length), tree.row_paths[-1]
        after = length + 1 + len(path)
        steps: list[tuple[np.ndarray, int, tuple[int, ...]]] = [
            (rng.integers(0, VOCAB, tree.rows), length, ()),
            (rng.integers(0, VOCAB, tree.rows), after, rows_to_move(length, path)),
        ]
        found: dict[str, list[Any]] = {}
        guesses: dict[str, list[np.ndarray]] = {variant: [] for variant in executors}
        for variant, executor in executors.items():
            result = prefill(executor, 0, prompt, 0, EVERYTHING)
            assert result.logits is not None and result.hidden is not None
            found[variant] = [result.logits.copy(), result.hidden.copy(), result.next_token]
            for tokens, kept, moves in steps:
                result = verify(executor, 0, tree, tokens, kept, moves, EVERYTHING)
                assert result.logits is not None and result.hidden is not None and result.log_probs is not None
                found[variant] += [result.logits.copy(), result.hidden.copy(), result.next_token, result.last_row]
                guesses[variant].append(result.log_probs.copy())
            written = executor.caches[:, 0, :, HEADS : HEADS + after]  # type: ignore[attr-defined]
            found[variant].append(written.copy())
        for one, other in zip(found["cpu"], found["standard"], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)
        np.testing.assert_allclose(guesses["cpu"], guesses["standard"], atol=0.1)  # heads in 8 bits


def test_the_heads_graph_agrees_with_the_heads_of_the_step(tiny_session: Session) -> None:
    executor = tiny_session.executor
    result = prefill(executor, 0, np.arange(10), 0, EVERYTHING)
    assert result.hidden is not None and result.candidates is not None
    candidates, log_probs = executor.propose(result.hidden, np.array([result.next_token]))
    assert np.array_equal(candidates[0], result.candidates)
    np.testing.assert_allclose(log_probs[0], result.log_probs, atol=1e-5)


def test_on_the_cpu_heads_are_computed_only_where_they_are_wanted(graphs: dict[str, Any]) -> None:
    """ONNX Runtime runs every node of a graph, whichever outputs are fetched: plain decoding paid for the heads."""
    nodes = graphs["cpu"].graph.node
    assert not {"TopK", "LogSoftmax"} & {node.op_type for node in nodes}
    [choice] = [node for node in nodes if node.op_type == "If"]
    assert (list(choice.input), list(choice.output)) == ([step_io.HEADS_WANTED], [step_io.CANDIDATES, step_io.LOG_PROBS])
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    assert "TopK" in {node.op_type for node in branches["then_branch"].node}
    assert {node.op_type for node in branches["else_branch"].node} == {"ConstantOfShape"}
