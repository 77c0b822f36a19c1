"""What two sides' answers have in common, and how their steps were accepted, counted by hand."""

from __future__ import annotations

import pytest

from medusa_deploy.runtime.session import Session
from medusa_deploy.tools.compare.runs import Decoded, acceptance, greedy_agreement
from medusa_deploy.tools.measure.timed_run import TimedRun


def test_greedy_agreement_and_acceptance_are_counted_by_hand(tiny_session: Session):
    a, b = Decoded(tiny_session), Decoded(tiny_session)
    a.runs["plain"] = [TimedRun([1, 2, 3, 4]), TimedRun([5, 6]), TimedRun([7, 8, 9])]
    b.runs["plain"] = [TimedRun([1, 2, 9, 4]), TimedRun([5, 6]), TimedRun([7, 8])]
    found = greedy_agreement(a, b, [[1]] * 3, 4)
    assert (found["identical"], found["common_prefix"]) == (1, {"median": 2, "mean": 2.0})
    assert found["same_after"] == [1.0, 1.0, 1 / 3, 1 / 3]
    assert [example["common_tokens"] for example in found["examples"]] == [2, 2, 2]
    assert found["examples"][0]["a"] == "1 2 3 4", "answers that differ come first"
    a.accepted, b.accepted = [{0: 2, 2: 2}, {1: 4}], [{0: 4, 2: 2}, {1: 2}]
    counted = acceptance(a, b)
    assert counted["a"] == {"mean_acceptance_length": 2.0, "histogram": [2, 4, 2]}
    assert counted["b"] == {"mean_acceptance_length": 1.75, "histogram": [4, 2, 2]}
    assert counted["ratio"] == 0.875
    low, high = counted["ratio_95"]
    assert low == pytest.approx((1 + 4 / 6) / 2) and high == 1, "all of the first prompt, or all of the second"
