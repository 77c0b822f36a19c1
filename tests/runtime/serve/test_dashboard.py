"""The dashboard for Grafana asks for metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from support.documents import ROOT
from support.fake_executor import fake_session
from support.server import drafting, serving


def test_every_panel_shows_metrics_of_the_server(tmp_path: Path) -> None:
    board = json.loads((ROOT / "docs" / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"medusa_\w+", expression)}
    with serving(drafting(fake_session(1, text_folder=tmp_path))) as server:
        assert server.complete(max_tokens=20, ignore_eos=True).status_code == 200
        assert server.complete(max_tokens=-1).status_code == 400
        text = server.http.get("/metrics").text
    found = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert names <= found, names - found
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    kinds = {name for name in found if name.startswith("medusa_") and not name.endswith("_created")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in kinds} == shown, "every metric has its panel"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) and all(panel["title"] for panel in board["panels"])
