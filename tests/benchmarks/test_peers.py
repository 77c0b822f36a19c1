"""benchmarks/peers.py: the interleaving and the report. No peer needs to be installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
from peer import convert, process as peer_process
from peer.process import PeerError, Run
from peer.systems import ONE, SEVERAL, SYSTEMS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class Talker:
    """Answers like a worker, at a given speed, and writes down who ran what."""

    pid = 0

    def __init__(self, name: str, diary: list[tuple[str, int]], seconds: float = 1.0, token: int = 5, fails_on: int = -1) -> None:
        self.name, self.diary, self.seconds, self.token, self.fails_on = name, diary, seconds, token, fails_on
        self.greeting: dict[str, Any] = {
            "installed": True,
            "python": "3.11.0",
            "versions": {name: "1.0"},
            "install_bytes": {name: 3 << 20, "numpy": 1 << 20},
        }

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        if what == "run":
            number, count = arguments["token_ids"][0], arguments["max_new_tokens"]
            self.diary.append((self.name, number))
            if number == self.fails_on:
                raise PeerError("out of luck")
            tokens = [self.token] * count
            return {"token_ids": tokens, "seconds": self.seconds, "first_token_seconds": self.seconds / 5, "steps": None}
        if what == "run_many":
            queue = arguments["prompts"]
            self.diary.append((self.name, len(queue)))
            if len(queue) == self.fails_on:
                raise PeerError("out of luck")
            return {"answers": [[self.token] * arguments["max_new_tokens"] for _ in queue], "seconds": self.seconds}
        if what == "encode":
            return {"prompts": [[0], [1], [2], [3]], "eos_token_ids": [2], "manifest_sha256": "ab" * 32}
        return {"load": {"seconds": 0.5}, "quit": {"peak_rss_bytes": 7 << 20}}[what]

    def stop(self) -> None:
        self.diary.append((self.name, -1))


def measure(talkers: dict[str, Talker], prompts: int, repeats: int = 1) -> tuple[dict[str, list[Run]], dict[str, str]]:
    return peer_process.measure(
        talkers, [[n] for n in range(prompts)], max_new_tokens=10, repeats=repeats, progress=lambda turn, name: None
    )


def test_every_prompt_runs_everywhere_before_the_next_and_the_first_place_rotates() -> None:
    diary: list[tuple[str, int]] = []
    runs, failed = measure({name: Talker(name, diary) for name in "abc"}, prompts=3, repeats=2)
    assert not failed
    assert [prompt for _, prompt in diary] == [n for n in [0, 1, 2, 0, 1, 2] for _ in "abc"]
    assert "".join(name for name, _ in diary) == "abcbcacab" * 2
    assert {name: len(done) for name, done in runs.items()} == {"a": 6, "b": 6, "c": 6}


def test_a_system_that_fails_half_way_drops_out_and_the_others_go_on() -> None:
    diary: list[tuple[str, int]] = []
    runs, failed = measure({"a": Talker("a", diary), "b": Talker("b", diary, fails_on=1)}, prompts=4)
    assert failed == {"b": "out of luck"}
    assert list(runs) == ["a"]
    assert len(runs["a"]) == 4
    assert diary.count(("b", 2)) == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def command_line(model: Path, *more: str) -> list[str]:
    cache = str(model.parent / "cache")
    return ["--model", str(model), "--bundle", str(model.parent / "bundle"), "--cache", cache, "--max-new-tokens", "10", *more]


def test_the_report_and_the_table(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diary: list[tuple[str, int]] = []
    seconds = {"llama.cpp": 2.0, "ours-plain": 1.0, "ours-medusa": 0.5, "transformers": 4.0}

    def start(name: str, *_: object) -> Talker:
        if name == "openvino-genai":
            raise PeerError("ended with status 1: broken")
        talker = Talker(name, diary, seconds.get(name, 1.0), token=6 if name == "transformers" else 5)
        if name == "onnxruntime-genai":
            talker.greeting = {"installed": False}
        return talker

    monkeypatch.setattr(peers, "start", start)
    monkeypatch.setattr(peers, "converted", lambda *_: tmp_path)
    output = tmp_path / "report.json"
    assert peers.main([*command_line(model), "--json", str(output)]) == 0

    report = json.loads(output.read_text())
    assert report["environment"].keys() >= {"date", "cpu", "cores", "platform"}
    assert report["settings"]["threads"] == 2
    assert report["settings"]["prompts"] == 4
    systems = report["systems"]
    assert list(systems) == list(ONE)
    assert systems["onnxruntime-genai"] == {
        "label": "onnxruntime-genai",
        "precision": "fp32",
        "status": "not installed",
        "reason": "pip install onnxruntime-genai",
    }
    assert systems["openvino-genai"]["status"] == "failed"
    medusa = systems["ours-medusa"]
    assert medusa["status"] == "measured"
    assert medusa["tokens_per_s"] == pytest.approx(20.0)
    assert medusa["decode_tokens_per_s"] == pytest.approx(9 / 0.4)
    assert medusa["ratio_to_llama_cpp"] == pytest.approx(4.0)
    assert medusa["load_s"] == 0.5
    assert medusa["peak_rss_mib"] == 7
    assert medusa["install_mib"] == 4
    assert medusa["install_unshared_mib"] == 3
    assert medusa["agreement"] == {"prompts": 4, "identical": 4, "prefix_share": 1.0}
    assert systems["transformers"]["agreement"]["identical"] == 0
    assert len(medusa["runs"]) == 4

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = [row.split(" | ")[0] for row in rows[2:]]
    assert {f"| {SYSTEMS[name].label}" for name in ONE if "lookup" in name} < set(shown), "with and without their speculation"
    assert [name for name in shown if "lookup" not in name] == [
        "| medusa-deploy, Medusa",
        "| medusa-deploy, plain",
        "| llama.cpp (llama-cpp-python)",
        "| transformers (sdpa)",
    ]
    assert len({row.count("|") for row in rows}) == 1
    assert all((name, -1) in diary for name in seconds)


SLOTS_RATES = {"llama.cpp": 2.0, "openvino-genai": 1.0, "ours-plain": 0.8, "ours-medusa": 0.5, "ours-int8-plain": 1.0}


def run_slots(
    model: Path, monkeypatch: pytest.MonkeyPatch, systems: str, *more: str, fails_on: int = -1
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    diary: list[tuple[str, int]] = []

    def start(name: str, *_: object) -> Talker:
        failing = fails_on if name == "openvino-genai" else -1
        return Talker(name, diary, SLOTS_RATES.get(name, 1.0), token=6 if name == "llama.cpp" else 5, fails_on=failing)

    monkeypatch.setattr(peers, "start", start)
    monkeypatch.setattr(peers, "converted", lambda *_: model)
    output = model.parent / "slots.json"
    args = ["--slots", "2,4", "--count", "4", "--repeats", "3", "--systems", systems, "--json", str(output), *more]
    assert peers.main(command_line(model, *args)) == 0
    return json.loads(output.read_text()), diary


def test_several_at_a_time_the_report_and_the_tables(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "llama.cpp,openvino-genai,ours-plain,ours-medusa,ours-int8-plain"
    report, diary = run_slots(model, monkeypatch, names)
    assert [load["slots"] for load in report["slots"]] == [2, 4]
    for load in report["slots"]:
        systems = load["systems"]
        assert list(systems) == names.split(",")
        assert systems["ours-medusa"]["tokens_per_s"] == pytest.approx(4 * 10 / 0.5)
        assert len(systems["ours-medusa"]["rounds"]) == 3
        assert load["best"] == {
            "fp32": {"peer": "openvino-genai", "of_best_peer": pytest.approx({"ours-plain": 1.25, "ours-medusa": 2.0})}
        }, "no peer has 8 bits"
        assert systems["llama.cpp"]["agreement"]["identical"] == 0
        assert systems["openvino-genai"]["agreement"] == {"prompts": 4, "identical": 4, "prefix_share": 1.0}
    queues = [name for name, count in diary if count == 4][:15]
    assert len({"".join(queues[turn : turn + 5]) for turn in (0, 5, 10)}) == 3, "another system is first in each round"
    shown = capsys.readouterr().out
    assert "| medusa-deploy, Medusa | 80.0 | 2.00 | 4/4 | 80.0 | 2.00 | 4/4 |" in shown
    assert shown.index("**fp32**") < shown.index("**8 bits**")


def test_a_system_that_fails_with_several_is_listed_with_the_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, _ = run_slots(model, monkeypatch, "openvino-genai,ours-plain", "--ignore-eos", fails_on=4)
    assert report["settings"]["ignore_eos"]
    assert {load["systems"]["openvino-genai"]["status"] for load in report["slots"]} == {"failed"}
    assert all(load["best"] == {} for load in report["slots"])
    shown = capsys.readouterr().out
    assert "exactly 10 new tokens" in shown
    assert "- openvino-genai, N = 2: failed: out of luck" in shown


def test_the_default_systems_are_those_that_can() -> None:
    assert all(SYSTEMS[name].several for name in SEVERAL)
    assert {SYSTEMS[name].precision for name in SEVERAL} == {"fp32", "8 bits"}
    assert {SYSTEMS[name].precision for name in ONE} == {"fp32"}
    assert {name.removesuffix("-lookup") for name in ONE if name.endswith("-lookup")} <= set(ONE)


def test_ours_answers_several_prompts_as_one_at_a_time(tiny_bundle: Path) -> None:
    from peer.base import Settings

    prompts = [[1, 5, 9], [2, 4], [3, 3, 3, 3], [7], [8, 9]]
    for name in ("ours-plain", "ours-medusa"):
        peer = SYSTEMS[name].peer
        peer.load(Settings(str(tiny_bundle), 1, 256, [2], ignore_eos=True))
        alone = [peer.run(prompt, 7).token_ids for prompt in prompts]
        peer.load(Settings(str(tiny_bundle), 1, 256, [2], slots=3, ignore_eos=True))
        assert peer.run_many(prompts, 7) == alone
        assert {len(tokens) for tokens in alone} == {7}


def test_without_the_baseline_there_is_no_ratio(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "start", lambda name, *_: Talker(name, []))
    args = peers.arguments(command_line(model, "--systems", "transformers"))
    entry = peers.run_peers(args)["systems"]["transformers"]
    assert entry["ratio_to_llama_cpp"] is None
    assert entry["agreement"] is None
    assert entry["install_unshared_mib"] == entry["install_mib"]


def test_a_conversion_is_done_once_and_a_failed_one_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    program = "import pathlib, sys; print('no such operator'); sys.exit(3)"
    monkeypatch.setattr(convert, "conversion", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(PeerError, match="status 3: no such operator"):
        convert.converted("openvino", model, cache, {})
    assert not [path for path in cache.rglob("*") if path.name.startswith("openvino")]

    def write(_: str, __: Path, output: Path, ___: object) -> list[str]:
        return [sys.executable, "-c", f"open({str(output / 'done')!r}, 'x')"]

    monkeypatch.setattr(convert, "conversion", write)
    folder = convert.converted("openvino", model, cache, {})
    assert (folder / "done").is_file()
    monkeypatch.setattr(convert, "conversion", lambda *_: pytest.fail("converted twice"))
    assert convert.converted("openvino", model, cache, {}) == folder

    (model / "config.json").write_text('{"rope_theta": 1}')
    assert convert.fingerprint(model) != folder.parent.name


def test_interpreters_can_be_named_for_all_peers_or_for_one() -> None:
    pythons = dict([peers.interpreter(sys.executable), peers.interpreter("transformers=env")])
    assert convert.python_for("llama.cpp", pythons) == sys.executable
    assert convert.python_for("transformers", pythons) == "env"
    assert convert.python_for("ours-plain", {"": "elsewhere"}) == sys.executable


@pytest.mark.parametrize(
    "wrong",
    [
        ["--systems", "vllm"],
        ["--python", "vllm=env"],
        ["--python", "/no/such/python"],
        ["--count", "0"],
        ["--slots", "1,4"],
        ["--slots", "4", "--systems", "transformers"],
        ["--slots", "4", "--count", "3"],
        ["--ignore-eos"],
    ],
)
def test_wrong_arguments_are_usage_errors(model: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        peers.arguments(command_line(model, *wrong))
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err
