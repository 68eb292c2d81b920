"""Charts and pictures of the operator's page: what is drawn is where its numbers are, and nothing else gets in."""

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hanse_common.federated_report import Count, Rate, ReliabilityBin, RocPoint
from hanse_server import charts, pictures
from hanse_server.charts import Axis, Bar, Point, around

MARKUP = "</text><script>alert(1)</script>\"'"


def parsed(chart: str) -> ET.Element:
    return ET.fromstring(chart)  # noqa: S314 - our own


def rates(*values: float) -> list[Rate]:
    return [Rate(value=value, low=max(0.0, value - 0.1), high=min(1.0, value + 0.1)) for value in values]


def corners(element: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def test_bars_are_as_high_as_they_count_and_stand_on_each_other() -> None:
    chart = parsed(
        charts.participation(
            [Bar(1, (("uploaded", 8), ("dropped", 2))), Bar(2, (("uploaded", 10),))], "two", "round"
        )
    )
    bars = [one.attrib for one in chart.iter("rect")]
    first, second, whole = ({name: float(bar[name]) for name in ("x", "y", "height")} for bar in bars)
    assert [bar["class"] for bar in bars] == ["uploaded", "dropped", "uploaded"]
    assert first["height"] == pytest.approx(4 * second["height"], abs=0.05)
    assert second["y"] + second["height"] == pytest.approx(first["y"], abs=0.02)
    assert whole["height"] == pytest.approx(first["height"] + second["height"], abs=0.02)
    assert whole["x"] > first["x"] == second["x"]
    assert chart.attrib["aria-label"] == "two"


def test_a_band_holds_its_line_and_its_ends_are_the_intervals() -> None:
    points = [Point(10, 0.5, 0.4, 0.7), Point(20, 0.6, 0.5, 0.8)]
    chart = parsed(charts.band(points, Axis(0.0, 1.0, percent=True), "label", "round"))
    (edge,), (line,) = (list(chart.iter(kind)) for kind in ("polygon", "polyline"))
    high, low = corners(edge)[:2], corners(edge)[:1:-1]
    for (x, top), (_, bottom), (place, middle) in zip(high, low, corners(line), strict=True):
        assert x == place
        assert top < middle < bottom
    zero, one = charts.HEIGHT - charts.BOTTOM, charts.TOP
    assert corners(line)[0][1] == pytest.approx(zero + 0.5 * (one - zero))
    assert "50 %" in [text.text for text in chart.iter("text")]


def test_one_point_alone_is_drawn() -> None:
    point = Point(7, 0.5, 0.4, 0.6)
    chart = parsed(charts.band([point], around([point]), "label", "round"))
    assert len(list(chart.iter("circle"))) == 1
    assert not list(chart.iter("polygon"))


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted), min_size=1, max_size=20
    )
)
def test_an_axis_holds_all_intervals(triples: Sequence[Sequence[float]]) -> None:
    points = [Point(x, value, low, high) for x, (low, value, high) in enumerate(triples)]
    axis = around(points, percent=True)
    assert 0 <= axis.low <= min(point.low for point in points) + 1e-9
    assert max(point.high for point in points) <= axis.high + 1e-9 <= 1 + 2e-9
    chart = charts.band(points, axis, "label", "round")
    assert "nan" not in chart
    assert "inf" not in chart
    parsed(chart)


def test_the_chosen_curve_has_a_band_and_goes_from_corner_to_corner() -> None:
    curve = [
        RocPoint(threshold=0.5, false_positive_rate=false, true_positive_rate=true)
        for false, true in zip(rates(0.1, 0.3), rates(0.6, 0.9), strict=True)
    ]
    chart = parsed(charts.roc([curve, [], curve], 0, "label", "x", "y"))
    drawn = [one.attrib["class"] for one in chart.iter("polyline")]
    assert drawn == ["chance", "other", "line"]
    line = corners(list(chart.iter("polyline"))[-1])
    assert line[0] == (charts.LEFT, charts.SQUARE - charts.BOTTOM)
    assert line[-1] == (charts.SQUARE - charts.RIGHT, charts.TOP)
    assert not list(parsed(charts.roc([curve, []], 1, "label", "x", "y")).iter("polygon"))


def test_calibration_leaves_out_what_the_noise_hides_and_goes_by_confidence() -> None:
    number = Count(value=5, low=1, high=9)
    sure, right = rates(0.9, 0.4), rates(0.8, 0.5)
    bins = [
        ReliabilityBin(low=0.8, high=0.9, photos=number, confidence=sure[0], accuracy=right[0]),
        ReliabilityBin(low=0.9, high=1, photos=number, confidence=None, accuracy=None),
        ReliabilityBin(low=0.3, high=0.4, photos=number, confidence=sure[1], accuracy=right[1]),
    ]
    chart = parsed(charts.reliability(bins, "label", "x", "y"))
    xs = [float(dot.attrib["cx"]) for dot in chart.iter("circle")]
    assert len(xs) == 2
    assert xs == sorted(xs)


def test_shares_fill_the_bar() -> None:
    chart = parsed(charts.shares([("uploaded", 3), ("dropped", 0), ("declined", 1)], "3 of 4"))
    parts = [(one.attrib["class"], float(one.attrib["width"])) for one in chart.iter("rect")]
    assert parts == [("track", 100.0), ("uploaded", 75.0), ("declined", 25.0)]
    assert len(list(parsed(charts.shares([], "none")).iter("rect"))) == 1


def test_names_are_escaped_and_nothing_has_a_style_or_a_script() -> None:
    point = Point(1, 0.5, 0.4, 0.6)
    for chart in (
        charts.band([point], around([point]), MARKUP, MARKUP),
        charts.participation([Bar(1, (("uploaded", 1),))], MARKUP, MARKUP),
        charts.roc([[]], None, MARKUP, MARKUP, MARKUP),
        charts.shares([("uploaded", 1)], MARKUP),
    ):
        root = parsed(chart)
        assert root.attrib["aria-label"] == MARKUP
        assert {element.tag for element in root.iter()} <= {
            "svg", "rect", "line", "text", "polygon", "polyline", "circle",
        }  # fmt: skip
        assert not any(name == "style" or name.startswith("on") for one in root.iter() for name in one.attrib)


# -- pictures -----------------------------------------------------------------------------------------------------


def test_a_masked_upload_looks_like_noise_and_a_sum_does_not() -> None:
    rng = np.random.default_rng(1)
    update = np.rint(1000 * np.sin(np.arange(4096) / 40)).astype(np.int32).view(np.uint32)
    mask = rng.integers(0, 1 << 32, 4096, dtype=np.uint64).astype(np.uint32)
    masked = update + mask
    assert pictures.randomness(masked) > 7.98
    assert pictures.randomness(update) < 6
    grey = pictures.mask(masked).astype(float)
    neighbours = np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.06
    sum_ = pictures.own_scale(update).astype(float)
    assert np.corrcoef(sum_[:, 1:].ravel(), sum_[:, :-1].ravel())[0, 1] > 0.9


def test_the_sums_zero_is_grey_and_its_extremes_are_black_and_white() -> None:
    total = np.zeros(4096, dtype=np.int32)
    total[:100], total[100:200] = 500, -500
    greys = pictures.own_scale(total.view(np.uint32)).ravel()
    assert set(greys[:100]) == {255}
    assert set(greys[100:200]) == {0}
    assert set(greys[200:]) == {128}


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=70))
def test_any_numbers_make_a_picture(numbers: list[int]) -> None:
    found = np.array(numbers, dtype=np.uint32)
    for greys in (pictures.mask(found), pictures.own_scale(found)):
        with Image.open(io.BytesIO(pictures.picture(greys))) as image:
            side = max(1, math.isqrt(len(numbers)))
            assert (image.format, image.mode, image.size) == ("PNG", "L", (side, side))
            assert np.array_equal(np.asarray(image), greys)
    assert 0 <= pictures.randomness(found) <= 8


def test_a_pixel_of_an_upload_is_its_numbers_first_byte() -> None:
    greys = pictures.mask(np.array([0xAB123456, 0x00FFFFFF, 0xFF000000, 0x7F0000AA], dtype=np.uint32))
    assert greys.tolist() == [[0xAB, 0x00], [0xFF, 0x7F]]


def test_a_picture_is_no_larger_than_64() -> None:
    assert pictures.mask(np.zeros(10_000, dtype=np.uint32)).shape == (64, 64)


def test_randomness_is_the_entropy_of_bytes() -> None:
    even = np.arange(256, dtype=np.uint8).repeat(4096).view(np.uint32)
    assert pictures.randomness(even) == pytest.approx(8, abs=1e-3)
    assert pictures.randomness(np.zeros(100, dtype=np.uint32)) == 0
    two = np.tile(np.array([0, 255], dtype=np.uint8), 1 << 16).view(np.uint32)
    assert math.isclose(pictures.randomness(two), 1, abs_tol=1e-4)
