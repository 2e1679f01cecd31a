"""Charts as SVG: what is drawn stands where its value says, scales start at zero or say so, text is literal."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from prefopt.charts import MAX_POINTS, Line, line_chart, stacked

LABELS = {"title": "Loss", "x_label": "step", "y_label": "nats"}
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def tick_places(svg: str) -> dict[float, float]:
    """Where the ticks of y stand, in pixels from the top."""
    ends = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.get("text-anchor") == "end"]
    at_left = min(float(e.get("x")) for e in ends)
    found = {float(e.text.replace("−", "-")): float(e.get("y")) - 4 for e in ends if float(e.get("x")) == at_left}
    return found


def drawn(svg: str) -> list[tuple[float, float]]:
    (path,) = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}path") if e.get("class") == "line"]
    return [tuple(map(float, point.split())) for point in re.split("[ML]", path.get("d"))[1:]]


def test_a_line_stands_where_its_values_say():
    """Half way between the ticks 0 and 1 lies 0.5; a value that is not finite is left out."""
    svg = line_chart([Line("", [1, 2, 3, 4], [0.0, 0.5, math.nan, 1.0])], **LABELS)
    places, points = tick_places(svg), drawn(svg)
    assert [y for _, y in points] == pytest.approx(
        [places[0.0], (places[0.0] + places[1.0]) / 2, places[1.0]], abs=0.2
    )
    assert points[1][0] - points[0][0] == pytest.approx((points[2][0] - points[1][0]) / 2, abs=0.2)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0.995, 1.002], False),
        ([3.0, 5000.0], False),
        ([-0.2, 0.4], False),
        ([-9.0, -3.0], False),
        ([0.0, 0.0], False),
        ([-9.0, -8.0], True),
        ([-301.0, -280.0], True),
    ],
)
def test_a_scale_starts_at_zero_or_says_where(values, named):
    """A length drift of 0.995 to 1.002 must not look like a collapse."""
    svg = line_chart([Line("", [1, 2], values)], **LABELS)
    label = next(text for text in texts(svg) if text.startswith("nats"))
    assert ("the scale starts at" in label) == named
    assert named or 0.0 in tick_places(svg)


def test_a_share_ends_at_one_and_its_mark_is_drawn():
    svg = line_chart([Line("", [1, 2], [0.4, 0.9])], **LABELS, at_most=1.0, mark=0.5)
    places = tick_places(svg)
    assert max(places) == 1.0 and min(places) == 0.0
    middle = (places[0.0] + places[1.0]) / 2
    assert f"{middle:.1f}H" in re.search(r'<path d="M[\d.]+ ([\d.]+H)\d+" stroke="#777"', svg)[0]


def test_an_interval_is_a_band_and_a_single_one_a_bar():
    band = line_chart([Line("", [1, 2], [0.4, 0.9], [0.3, 0.8], [0.5, 1.0])], **LABELS)
    (outline,) = re.findall(r'<polygon points="([^"]+)"', band)
    assert len(outline.split()) == 4
    single = line_chart([Line("", [1], [0.4], [0.3], [0.5])], **LABELS)
    assert "<polygon" not in single and single.count("<circle") == 1 and "V" in single


def test_long_runs_are_thinned_and_keep_their_last_value():
    count = 40 * MAX_POINTS
    svg = line_chart([Line("", range(count), [0.5] * (count - 1) + [1.0])], **LABELS)
    points = drawn(svg)
    assert len(points) <= MAX_POINTS + 1
    assert points[-1][1] == pytest.approx(tick_places(svg)[1.0], abs=0.2)


def test_text_is_shown_literally_and_legends_wrap():
    hostile = '<script>alert("x")</script>'
    lines = [Line(f"{hostile} {place}", [1, 2], [1, 2], colour=place) for place in range(5)]
    svg = line_chart(lines, title=hostile, x_label=hostile, y_label=f"nats {hostile}")
    assert "<script" not in svg
    assert sum(text.startswith(hostile) for text in texts(svg)) == 7
    legend = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if (e.text or "").startswith(f"{hostile} ")]
    assert len({e.get("y") for e in legend}) > 1


def test_charts_are_stacked_without_overlap():
    charts = [line_chart([Line("", [1, 2], [1, 2])], **LABELS)] * 2
    outer = ElementTree.fromstring(stacked(charts))
    first, second = outer.findall(f"{SVG}svg")
    assert float(second.get("y")) == float(first.get("height")) and float(outer.get("height")) == 2 * float(
        first.get("height")
    )
