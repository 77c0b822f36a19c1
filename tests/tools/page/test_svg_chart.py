"""Charts: bars as tall as their values, lines broken where nothing is known, labels that can't break out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from medusa_deploy.tools.page.svg_chart import Series, bars, lines, percent


def drawing(chart: str) -> ET.Element:
    return ET.fromstring(chart[chart.index("<svg") :])  # noqa: S314 what we drew ourselves


def test_bars_are_as_tall_as_their_values() -> None:
    chart = drawing(bars(["x", "y"], [Series("one", "a", [1.0, 2.0]), Series("two", "b", [4.0, None])], "kind"))
    heights = [float(bar.attrib["height"]) for bar in chart.iter("rect")]
    assert len(heights) == 3
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 4], rel=0.01)
    assert [bar.findtext("title") for bar in chart.iter("rect")] == ["x: one 1", "y: one 2", "x: two 4"]
    bottoms = {round(float(bar.attrib["y"]) + float(bar.attrib["height"])) for bar in chart.iter("rect")}
    assert len(bottoms) == 1


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    chart = drawing(lines(list("abcde"), [Series("one", "a", [1.0, 2.0, None, 3.0, 1.0])], "layer"))
    assert [len(line.attrib["points"].split()) for line in chart.iter("polyline")] == [2, 2]
    assert len(list(chart.iter("circle"))) == 4


def test_the_scale_holds_every_value_with_round_ticks() -> None:
    for largest in (3e-7, 0.013, 0.99, 1.0, 7.0, 4321.0):
        chart = drawing(bars(["x"], [Series("one", "a", [largest])], "kind"))
        [bar] = chart.iter("rect")
        assert float(bar.attrib["y"]) >= 9.9
        assert float(bar.attrib["height"]) > 90
    texts = [text.text for text in drawing(lines(["x"], [Series("one", "a", [0.5])], "n", percent, most=1.0)).iter("text")]
    assert texts[:5] == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def test_nothing_to_draw_is_drawn() -> None:
    for chart in (bars([], [Series("one", "a", [])], "n"), lines(["x"], [Series("one", "a", [0.0])], "n")):
        assert drawing(chart) is not None


def test_many_labels_are_thinned_and_all_are_escaped() -> None:
    chart = bars([f"<{index}>" for index in range(40)], [Series("a & b", "a", [1.0] * 40)], "x < y")
    assert len(re.findall(r">&lt;\d+&gt;</text>", chart)) <= 9
    assert "a &amp; b" in chart
    drawing(chart)
