"""Verification: from an engine's results to the rows that survive. Pure: nothing is changed here."""

from __future__ import annotations

from ..errors import DeployError, GrammarError, NumericsError, StepError
from ..executors.step_plan import SlotResult, SlotRows, StepPlan, StepResult
from .acceptance import Acceptance, accept
from .scheduler import Turn

_NOTHING = Acceptance((), [])


def verify(turns: list[Turn], plan: StepPlan, result: StepResult) -> list[Acceptance | Exception]:
    """Return, for each turn, the accepted rows with the emitted tokens, or the error that ends its sequence.

    A prompt whose end isn't reached accepts nothing and emits nothing.
    """
    return [_verified(turn, rows, found) for turn, rows, found in zip(turns, plan.active, result.slots, strict=True)]


def _verified(turn: Turn, rows: SlotRows, found: SlotResult | Exception) -> Acceptance | Exception:
    if isinstance(found, Exception):
        return named(found)
    sequence = turn.sequence
    path = () if turn.prompt_rows or rows.count == 1 else rows.shape.row_paths[found.last_row]
    drafted = rows.tokens[list(path)].tolist()
    # The host looks at all logits that it chooses from. Where the answer ends before the row with NaN, nobody needs that row.
    if not found.finite and found.logits is None and not sequence.ends_with(drafted):
        return NumericsError("the engine returned NaN", hint="verify the bundle: medusa-deploy verify BUNDLE")
    if turn.prompt_rows and sequence.computed + turn.prompt_rows < sequence.prompt_length:
        return _NOTHING
    if not sequence.on_host:
        return Acceptance(path, [*drafted, found.next_token])
    assert found.logits is not None
    parents, tokens = (rows.shape.parents, rows.tokens) if not turn.prompt_rows else (rows.shape.parents[:1], rows.tokens[-1:])
    try:
        history, length = sequence.tokens, sequence.prompt_length
        return accept(sequence.params, parents, tokens, found.logits, history, length, sequence.matcher)
    except (NumericsError, GrammarError) as error:
        return error


def named(error: Exception) -> DeployError:
    """Return the error that ends a request whose engine call raised ``error``."""
    if isinstance(error, DeployError):
        return error
    failed = StepError(f"the engine failed: {error}", hint="try again; check the bundle with: medusa-deploy verify BUNDLE")
    failed.__cause__ = error
    return failed
