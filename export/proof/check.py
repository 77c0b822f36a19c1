"""Compares an exported bundle with the torch module that it came from, before the bundle is committed.

The reference is transformers' own attention over whole sequences, not the traced module: it shares no code with the step
graph, so a wrong mask, position, cache row or commit shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ...runtime.errors import ExportMismatchError, NumericsError
from ...runtime.executors import step_io
from ...runtime.executors.executor import Executor
from ...runtime.executors.one_slot import prefill_rows, run_one
from ...runtime.executors.step_plan import SlotRows, Wanted, rows_to_move
from ...runtime.tree import Tree
from ..backbone.record import Backbone
from ..backbone.refusal.positions import position_rows
from ..heads.module import HeadStack

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}
_PROMPT = 24
_CHUNK = 256
# A prompt longer than a window costs as much as parameters · tokens, and its largest array has to fit.
MOST_WORK = 6e11
MOST_BYTES = 1 << 30
_WANTED = Wanted(heads=True, logits=True, hidden=True)
Reference = Callable[[np.ndarray], np.ndarray]
"""Maps tokens int64 [n] to float32 logits [n, V] after each of them."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Reports a comparison over ``rows`` rows.

    ``max_logit_error``: largest absolute difference. ``logit_scale``: largest absolute logit of the reference.
    ``argmax_agreement`` and ``head_agreement``: shares of rows, and of heads, with the same best token. ``windows``: those that
    some rows were too far from the first token to see all of. ``missed``: those that no row reached the end of.
    """

    max_logit_error: float
    logit_scale: float
    argmax_agreement: float
    head_agreement: float
    rows: int
    windows: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()


def probe_tree(heads: int) -> Tree:
    """Make a tree of two branches at every depth. Its last path has rows that aren't adjacent, so committing it moves rows."""
    return Tree.from_choices([(branch, *(0,) * depth) for branch in (0, 1) for depth in range(heads)])


@dataclass(frozen=True, slots=True)
class Observed:
    """Holds an executor's results. ``rows``: contexts and the logits [V] after them. ``heads``: context, root, candidates [K, k].

    ``greedy``: the token that is chosen after the first row's context if no logits are wanted.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    heads: list[tuple[np.ndarray, int, np.ndarray]]
    greedy: int


def checked_steps(num_heads: int) -> int:
    """Return the number of tokens that :func:`observe` commits behind its prompt."""
    return 2 * (num_heads + 1)


def graph_windows(cpu_graph: Path) -> tuple[int, ...]:
    """Return the windows of a graph's layers in ascending order. The inputs of a CPU graph name them."""
    inputs = onnx.load(cpu_graph, load_external_data=False).graph.input
    found = step_io.mask_windows([value.name for value in inputs]).values()
    return tuple(sorted(window for window in found if window is not None))


def prompt_length(module: Any, windows: tuple[int, ...], capacity: int, steps: int, least: int = _PROMPT) -> int:
    """Return the tokens of a check's prompt: beyond the longest window that it can cross in bounded time and memory.

    ``steps``: tokens that follow it. ``least``: without windows; a table of learned positions may have room for fewer.
    """
    table = position_rows(module)
    least = least if table is None else min(least, table - steps)
    config, parameters = module.config, sum(parameter.numel() for parameter in module.parameters())
    for window in sorted(windows, reverse=True):
        tokens = max(least, min(window + least, capacity - steps))
        # All rows' logits, and one layer's scores, in float32.
        largest = 4 * tokens * max(module.get_output_embeddings().weight.shape[0], config.num_attention_heads * tokens)
        if parameters * tokens <= MOST_WORK and largest <= MOST_BYTES:
            return tokens
    return least


def with_windows(report: CheckReport, windows: tuple[int, ...], tokens: int) -> CheckReport:
    """Say in a report which ``windows`` a check of ``tokens`` tokens has crossed."""
    crossed = tuple(window for window in windows if window < tokens)
    return replace(report, windows=crossed, missed=tuple(window for window in windows if window not in crossed))


def check_executor(
    executor: Executor, backbone: Backbone, heads: HeadStack, capacity: int, windows: tuple[int, ...] = (), seed: int = 0
) -> CheckReport:
    """Compare the results of :func:`observe` with the torch module. ``windows``: of the graph's layers.

    Raises:
        NumericsError: logits that aren't finite.
        ExportMismatchError: the difference is beyond rounding in the graph's dtype.
    """
    num_heads = heads.config.num_heads
    steps = checked_steps(num_heads)
    prompt_rows = prompt_length(backbone.module, windows, capacity, steps)
    observed = observe(executor, num_heads, backbone.shape.vocab_size, prompt_rows=prompt_rows, seed=seed)
    report = compare(observed, eager_reference(backbone), backbone, heads)
    return with_windows(report, windows, prompt_rows + steps)


def observe(executor: Executor, num_heads: int, vocab_size: int, *, prompt_rows: int, seed: int = 0) -> Observed:
    """Prefill in chunks, verify a tree of random tokens, commit its longest path, verify again."""
    tree = probe_tree(num_heads)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, vocab_size, prompt_rows)
    rest = [0] * (executor.layout.slots - 1)
    last = (prompt_rows - 1) // _CHUNK * _CHUNK
    for start in range(0, last, _CHUNK):
        run_one(executor, prefill_rows(0, prompt[start : start + _CHUNK]), [start, *rest])
    greedy = run_one(executor, prefill_rows(0, prompt[last:]), [last, *rest]).next_token
    prefill = run_one(executor, prefill_rows(0, prompt[last:], _WANTED), [last, *rest])
    assert prefill.logits is not None and prefill.candidates is not None, "they were wanted"
    rows = [(prompt, prefill.logits[0].astype(np.float32))]
    head_pairs = [(prompt, prefill.next_token, prefill.candidates.copy())]
    context, length, moves = prompt, prompt_rows, tuple[int, ...]()
    for _ in range(2):
        tokens = rng.integers(0, vocab_size, tree.rows)
        step = run_one(executor, SlotRows(0, tokens, tree, wanted=_WANTED), [length, *rest], moves)
        assert step.logits is not None, "they were wanted"
        for row in range(tree.rows):
            path = [0, *tree.row_paths[row]]
            rows.append((np.concatenate([context, tokens[path]]), step.logits[row].astype(np.float32)))
        # Take the last (deepest) path as accepted, whatever the logits say: the next step must see exactly its rows.
        accepted = tree.row_paths[-1]
        moves = rows_to_move(length, accepted)
        context, length = np.concatenate([context, tokens[[0, *accepted]]]), length + 1 + len(accepted)
    return Observed(rows, head_pairs, greedy)


def compare(observed: Observed, reference: Reference, backbone: Backbone, heads: HeadStack) -> CheckReport:
    """Compare every row's logits and every head's candidates with the torch module's.

    Raises:
        NumericsError, ExportMismatchError: as :func:`check_executor`.
    """
    rows = observed.rows
    error = scale = 0.0
    agreed = 0
    known: list[tuple[np.ndarray, np.ndarray]] = []
    # Longest first: one run of the reference gives the logits after every row of a path.
    for tokens, logits in sorted(rows, key=lambda row: -len(row[0])):
        expected = _after(tokens, reference, known)
        if not np.isfinite(logits).all():
            raise NumericsError("the exported graph returned NaN or infinite logits", hint="try --dtype fp32")
        error = max(error, float(np.abs(logits - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
        agreed += int(logits.argmax() == expected.argmax())
    head_agreed = []
    for tokens, root, candidates in observed.heads:
        ids = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            state = backbone.module.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, -1:]
            embedding = backbone.module.get_input_embeddings()(torch.tensor([[root]]))
            expected_candidates, _ = heads(state, embedding)
        head_agreed.append(float((expected_candidates[0, :, 0].numpy() == candidates[:, 0]).mean()))
    report = CheckReport(error, scale, agreed / len(rows), float(np.mean(head_agreed)), len(rows))
    limit = _TOLERANCE[backbone.dtype] * max(scale, 1.0)
    if not error <= limit:
        raise ExportMismatchError(
            f"logits of the exported graph differ by {error:.3g} from the torch module's (limit {limit:.3g}, {len(rows)} rows, "
            f"argmax equal in {report.argmax_agreement:.0%})",
            hint="this architecture isn't expressed rightly: please report it with the model's config.json",
        )
    _, first = rows[0]
    behind = float(first.max() - first[observed.greedy])
    if not behind <= limit:
        raise ExportMismatchError(
            f"the exported graph chooses token {observed.greedy}, whose logit is {behind:.3g} below the largest one",
            hint="please report it with the model's config.json",
        )
    return report


def _after(tokens: np.ndarray, reference: Reference, known: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Look up the logits [V] after ``tokens`` in a known sequence that begins with them, or else ask the reference."""
    for sequence, logits in known:
        if np.array_equal(sequence[: len(tokens)], tokens):
            return np.asarray(logits[len(tokens) - 1])
    logits = reference(tokens)
    known.append((tokens, logits))
    return np.asarray(logits[-1])


def eager_reference(backbone: Backbone) -> Reference:
    """Switch the module to transformers' own eager attention. Returns a function that computes its logits in float32."""
    module = backbone.module
    module.set_attn_implementation("eager")

    def run(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            # The whole causal LM: whatever it does to its logits after the projection shows here.
            logits: np.ndarray = module(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()
            return logits

    return run
