"""Charts: ticks that are round, dots and bars where their numbers say, text that is text."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from bnre_exp.report.svg import WIDTH, Dot, bar_chart, dot_chart, line_chart, ticks


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(one.get("cx")), float(one.get("cy"))) for one in parsed(svg).iter("circle")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.3, 0.31, [-0.2, 0, 0.2]), (95, 1020, [200, 400, 600, 800, 1000]),
     (1.2e-7, 3.3e-7, [1.5e-7, 2e-7, 2.5e-7, 3e-7])],
)  # fmt: skip
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low", [-1e9, -3.7, 0.0, 1e-12, 0.1234])
@pytest.mark.parametrize("span", [1e-12, 0.07, 1, 3.3, 9.99, 1e6])
def test_ticks_of_any_range_are_few_and_inside(low, span):
    high = low + span
    if high - low < span / 2:
        pytest.skip("float64 does not tell the two apart")
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low - span / 1e3 <= mark <= high + span / 1e3 for mark in found)


def test_dots_stand_in_proportion_and_intervals_with_them():
    dots = [Dot("a", 0.0, "0"), Dot("b", 0.25, "0.25", (0.0, 0.5)), Dot("c", 1.0, "1", is_hollow=True)]
    svg = dot_chart("t", dots, axis="units", reference=0.5)
    (a, first), (b, second), (c, third) = circles(svg)
    assert b - a == pytest.approx((c - a) / 4, abs=0.2) and second - first == third - second
    low, high = map(float, re.search(r'class="interval" d="M([\d.]+) [\d.]+H([\d.]+)', svg).groups())
    line = next(one for one in parsed(svg).iter("line") if one.get("class") == "reference")
    assert low == pytest.approx(a, abs=0.2) and high == pytest.approx((a + c) / 2, abs=0.2)
    assert float(line.get("x1")) == pytest.approx(high, abs=0.2)
    assert [one.get("fill") for one in parsed(svg).iter("circle")] == ["currentColor"] * 2 + ["var(--paper)"]
    assert parsed(svg).find("desc").text == "a: 0; b: 0.25 (0.0000 to 0.5000); c: 1"


def test_numbers_of_an_axis_do_not_overlap_however_little_room_there_is():
    for label in ("a", "a" * 26):
        for high in (0.0108, 0.0123, 1.0, 123456.0):
            svg = dot_chart("t", [Dot(label, 0.0, "9" * 10), Dot(label, high, "1")])
            marks = [(float(one.get("x")), len(one.text)) for one in parsed(svg).iter("text") if one.get("class")]
            assert marks and all(
                right - left >= 6 * (wide + next_wide) / 2
                for (left, wide), (right, next_wide) in itertools.pairwise(marks)
            )
    numbers = {n: 0.1 for n in (1, 2, 5, 10, 20, 50, 100, 110, 200, 400)}
    svg = line_chart("t", {"a": numbers}, x_label="batches", is_log=True)
    texts = [one for one in parsed(svg).iter("text") if one.get("class") and one.get("text-anchor") == "middle"]
    assert [one.text for one in texts] == ["1", "2", "5", "10", "20", "50", "100", "200", "400", "batches"]


def test_a_legend_names_the_colours():
    svg = dot_chart("t", [Dot("a", 0.0, "0", colour=1)], names=["first", "second"])
    assert [one.text for one in parsed(svg).iter("text")][:2] == ["first", "second"]
    alone = line_chart("t", {"FP32": {}, "QAT": {1: 0.1, 2: 0.2}}, x_label="epoch")
    assert {one.get("class") for one in parsed(alone).iter("g")} == {"c1"}  # as beside FP32


@pytest.mark.parametrize("values", [[0.3], [0.0, 0.0], [-2.0, -2.0], [1e30, -1e30], [1e-300, 2e-300]])
def test_equal_and_extreme_values_are_drawn_inside(values):
    svg = dot_chart("t", [Dot("a", value, "") for value in values])
    assert len(circles(svg)) == len(values) and all(0 < x < WIDTH for x, _ in circles(svg))


def test_a_value_that_is_not_finite_has_its_row_and_no_dot():
    svg = dot_chart(
        "t", [Dot("fine", 0.5, "0.5"), Dot("lost", math.nan, "nan"), Dot("x", math.inf, "inf", (0, math.inf))]
    )
    assert len(circles(svg)) == 1 and {"lost", "nan", "x"} <= {one.text for one in parsed(svg).iter("text")}
    assert dot_chart("t", [Dot("lost", math.nan, "nan")]) == "" and dot_chart("t", []) == ""


def test_long_labels_stand_above_their_rows_and_are_cut():
    svg = dot_chart("t", [Dot("a" * 100, 0.0, "0"), Dot("b", 1.0, "1")])
    labels = [one for one in parsed(svg).iter("text") if one.text.startswith(("a", "b"))]
    assert labels[0].text == "a" * 61 + "…" and {one.get("x") for one in labels} == {"10.0"}
    assert [y > float(one.get("y")) for (_, y), one in zip(circles(svg), labels)] == [True, True]


def test_bars_are_as_long_as_their_numbers():
    svg = bar_chart("t", [("a", 2.0, "2 MB"), ("b", 8.0, "8 MB"), ("none", math.nan, "nan"), ("zero", 0.0, "0 MB")])
    widths = [float(one.get("width")) for one in parsed(svg).iter("rect")]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.3) and len(widths) == 3 and widths[2] == 1
    assert bar_chart("t", [("a", math.nan, "")]) == ""


def test_lines_have_a_point_for_each_number_and_logarithms_their_distances():
    lines = {"one": {1: 0.0, 10: 1.0, 100: 0.5}, "two": {10: 0.2, 1: math.nan, 100: 0.4}, "none": {}}
    svg = line_chart("t", lines, x_label="batches", is_log=True)
    points = circles(svg)
    (x1, _), (x10, _), (x100, _) = points[:3]
    assert x10 - x1 == pytest.approx(x100 - x10, abs=0.2) and len(points) == 5
    heights = [y for _, y in points[:3]]
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.2) and heights[1] < heights[0]
    text = [one.text for one in parsed(svg).iter("text")]
    assert {"one", "two", "1", "10", "100", "batches"} <= set(text) and "none" not in text
    plain = circles(line_chart("t", lines, x_label="n"))
    assert plain[1][0] - plain[0][0] == pytest.approx((plain[2][0] - plain[0][0]) / 11, abs=0.2)
    assert line_chart("t", {"a": {1: 0.5}, "b": {}}, x_label="epoch") == ""


def test_a_thousand_epochs_have_few_marks():
    svg = line_chart("t", {"a": {n: 1 / n for n in range(1, 1001)}}, x_label="epoch")
    assert not circles(svg) and len(svg) < 20_000
    marks = [one.text for one in parsed(svg).iter("text") if one.get("y") == "235.0" or one.text.endswith("00")]
    assert {"200", "1000"} <= set(marks) and len(marks) < 10


def test_text_is_text_and_pictures_say_what_they_show():
    bad = "<script>alert('&')</script>"
    for svg in (
        dot_chart(bad, [Dot(bad, 1.0, bad)], axis=bad),
        bar_chart(bad, [(bad, 1.0, bad)]),
        line_chart(bad, {bad: {1: 0.0, 2: 1.0}}, x_label=bad),
    ):
        root = parsed(svg)
        assert "<script" not in svg and bad in [one.text for one in root.iter("text")]
        named = {one.get("id"): one for one in root.iter() if one.get("id")}
        title, description = (named[key] for key in root.get("aria-labelledby").split())
        assert root.get("role") == "img" and title.text == bad and description.tag == "desc" and description.text
