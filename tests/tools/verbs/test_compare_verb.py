"""The verb compare: its page, its report and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


from medusa_deploy.tools import cli
from support.documents import Reader
from support.faulty import wrong_next_tokens
from support.text import text_bundle
from support.tiny import VOCAB

OPTIONS = ["--count", "2", "--max-new-tokens", "8", "--threads", "1"]


def test_the_verb_writes_one_page_and_one_report(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = text_bundle(tiny_bundle, tmp_path / "a <b>bundle")
    prompts = tmp_path / "prompts.jsonl"
    evil = "<script>alert('x')</script>&amp;"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (evil, "hello")), "utf-8")
    html, output = tmp_path / "out" / "report.html", tmp_path / "out" / "report.json"
    command = ["compare", str(bundle), str(bundle), "--variant-b", "standard", "--prompts", str(prompts), "--limit", "2"]
    command += ["--max-new-tokens", "8", "--threads", "1", "--rows", "4", "--html", str(html), "--json", str(output)]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("within budget: perplexity ")
    assert shown.err == ""
    found = json.loads(output.read_text("utf-8"))
    sides = [found["environment"][side] for side in ("a", "b")]
    assert [side["variant"] for side in sides] == ["cpu", "standard"]
    assert found["environment"]["cpu"] and found["environment"]["threads"] == 1 and sides[0]["manifest_sha256"]
    assert (found["rows"], found["prompts"], found["max_new_tokens"]) == (4, 2, 8)
    assert found["prose"]["positions"] > 1000
    assert found["speed"]["a"]["plain"]["tokens_per_s"] > 0 and found["speed"]["medusa_ratio"] > 0
    read = Reader(html.read_text("utf-8"))
    assert read.open == []
    assert not {"script", "link", "img", "iframe", "a href", "svg onload"} & set(read.seen)
    assert read.seen.count("svg") == 5, "six charts, but nothing disagrees"
    assert evil in "".join(read.words), "shown as it is"
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?\w+:", html.read_text("utf-8"))
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json"]

    before = html.read_bytes(), output.read_bytes()
    assert cli.main(command) == 1
    assert "report.html exists" in capsys.readouterr().err
    assert (html.read_bytes(), output.read_bytes()) == before
    assert cli.main([*command[: command.index("--html")], "--json", str(output)]) == 1
    assert "report.json exists" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0
    assert output.read_bytes() != before[1], "at least its date"


def test_the_verb_exits_with_1_over_the_budget(tiny_bundle: Path, other_bundle: Path, capsys: pytest.CaptureFixture[str]):
    command = ["compare", str(tiny_bundle), str(other_bundle), *OPTIONS, "--json", "-"]
    assert cli.main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["verdict"]["passed"]
    assert cli.main([*command[:-2], "--max-perplexity-increase", "1e6", "--min-acceptance-ratio", "0"]) == 0
    assert capsys.readouterr().out.startswith("within budget")


def test_the_verb_exits_with_1_when_a_divergence_is_unexplained(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wrong_next_tokens(monkeypatch, lambda turn: turn.sequence.drafter.rows > 1 and len(turn.sequence.emitted) == 5, VOCAB)
    assert cli.main(["compare", str(tiny_bundle), str(tiny_bundle), *OPTIONS, "--min-acceptance-ratio", "0"]) == 1
    shown = capsys.readouterr().out
    assert re.match(r"OVER BUDGET: [1-9]\d* unexplained divergences \(none\)", shown)
    assert re.search(r"^B with 4 rows: prompt 1, token 6: \d+ plain, \d+ here; gap [\d.]+, noise", shown, re.MULTILINE)
