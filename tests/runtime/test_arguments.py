"""Arguments from Python: numpy's numbers are numbers, None is "not given", anything else is a named error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import Request, SamplingParams, Session, arguments, load
from medusa_deploy.runtime.errors import DeployError, SamplingError, UsageError
from medusa_deploy.runtime.request import Rows

PLAIN = {"token_ids": [1, 5, 9], "max_new_tokens": 4, "ignore_eos": True}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": np.int64(4)},
        {"rows": np.int64(4)},
        {"lookup": np.False_},
        {"ignore_eos": np.True_},
        {"priority": np.int32(0)},
        {"deadline": np.float32(1000)},
        {"token_ids": np.array([1, 5, 9])},
        {"params": None, "stop": None, "include_stop": None, "priority": None, "drafting": None, "keep_hidden": None},
        {"params": SamplingParams(temperature=None, top_k=None, logit_bias=None, mode=None)},  # type: ignore[arg-type]
        {"params": SamplingParams(logit_bias={np.int64(3): np.float32(0)})},
    ],
)
def test_numbers_of_numpy_and_none_are_taken(tiny_session: Session, options: dict[str, Any]) -> None:
    expected = tiny_session.generate(**PLAIN).token_ids
    assert tiny_session.generate(**{**PLAIN, **options}).token_ids == expected


def test_sampling_takes_numbers_of_numpy(tiny_session: Session) -> None:
    own = SamplingParams("sample", np.float32(0.5), np.int64(9), np.float64(0.9), seed=np.int64(7))
    assert type(own.temperature) is float and type(own.seed) is int
    pythons = SamplingParams("sample", 0.5, 9, 0.9, seed=7)
    assert own == pythons
    found = [tiny_session.generate(**PLAIN, params=params).token_ids for params in (own, pythons)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"mode": "sample"}}, "params is {'mode': 'sample'}"),
        ({"stop": 3}, "stop is 3"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"rows": "3"}, "rows is '3'"),
        ({"tree": [(0,)]}, r"tree is \[\(0,\)\]"),
        ({"drafter": 3}, "drafter is 3"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
        ({"lookup": 1}, "lookup is 1"),
        ({"priority": "high"}, "priority is 'high'"),
        ({"deadline": "soon"}, "deadline is 'soon'"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"cancel": True}, "cancel is True"),
        ({"speculative": "no"}, "speculative is 'no'"),
    ],
)
def test_other_types_are_refused_by_name(tiny_session: Session, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny_session.generate(**{**PLAIN, **options})
    assert caught.value.hint


@pytest.mark.parametrize("options", [{"logit_bias": [1]}, {"temperature": "hot"}, {"seed": 1.5}, {"mode": ["sample"]}])
def test_sampling_params_of_other_types_are_refused(tiny_session: Session, options: dict[str, Any]) -> None:
    with pytest.raises(SamplingError):
        tiny_session.generate(**PLAIN, params=SamplingParams(**{"mode": "sample", **options}))


@pytest.mark.parametrize(
    "options",
    [{"slots": "2"}, {"slots": 1.0}, {"threads": 0}, {"threads": "1"}, {"backend": 3}, {"variant": 3}, {"check_hashes": "no"}],
)
def test_load_refuses_other_types(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load(tiny_bundle, **options)


def test_load_takes_numbers_of_numpy_and_none(tiny_bundle: Path) -> None:
    session = load(tiny_bundle, slots=np.int64(2), threads=np.int32(1), check_hashes=None, backend=None)  # type: ignore[arg-type]
    assert session.slots.slots == 2


@pytest.mark.parametrize("bundle", [None, 3, ""])
def test_load_refuses_what_is_no_path(bundle: Any) -> None:
    with pytest.raises(UsageError, match="bundle is"):
        load(bundle)


def test_records_refuse_before_a_session_sees_them() -> None:
    with pytest.raises(DeployError):
        Rows(0)
    assert Request(token_ids=[1], max_new_tokens=np.int64(2)).max_new_tokens == 2  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Knobs:
    count: int = 3
    share: float = 0.5
    on: bool = False
    name: str = "a"
    most: int | None = None
    place: Path | None = None

    def __post_init__(self) -> None:
        arguments.settle(self, {"count": (1, 9), "share": (0, 1)})


def test_a_record_of_settings_settles_its_fields() -> None:
    found = Knobs(np.int64(4), np.float32(0.25), np.True_, None, np.int32(7), "a/b")  # type: ignore[arg-type]
    assert found == Knobs(4, 0.25, True, "a", 7, Path("a/b"))
    assert [type(getattr(found, each.name)) for each in dataclasses.fields(found)][:5] == [int, float, bool, str, int]
    assert Knobs(None, None, None, None, None, None) == Knobs()  # type: ignore[arg-type]
    assert Knobs(share=1).share == 1.0 and type(Knobs(share=1).share) is float


@pytest.mark.parametrize(
    "change",
    [{"count": 0}, {"count": 10}, {"count": 2.0}, {"count": "2"}, {"count": True}, {"share": 1.5}, {"share": "x"},
     {"share": float("nan")}, {"on": 1}, {"name": 3}, {"most": 1.5}, {"most": -1}, {"place": 3}, {"place": ""}],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_type_or_size_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(change))} is ") as caught:
        Knobs(**change)
    assert caught.value.hint.startswith(next(iter(change)))


@pytest.mark.parametrize("value", ["sm_89", b"x", 3, None, [1], ["a", None]], ids=str)
def test_what_is_no_list_of_strings_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="names is"):
        arguments.strings("names", value)


@pytest.mark.parametrize("value", ["12", b"12", 3, None, ["1"], [True], [0], {1: 2}], ids=str)
def test_what_is_no_list_of_integers_is_refused(value: Any) -> None:
    assert arguments.integers("sizes", np.array([1, 2])) == (1, 2)
    with pytest.raises(UsageError, match="sizes is"):
        arguments.integers("sizes", value)
