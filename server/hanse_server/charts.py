"""Charts for the operator's page, drawn on the server as inline SVG: no script, no style attribute.

    chart = participation(bars, "Who took part in the last 60 rounds")
    chart = band([Point(10, 0.7, 0.66, 0.74), Point(20, 0.8, 0.77, 0.83)], Axis(0, 1), "Accuracy", "round")

Colours come from classes of operator.css, so that they follow the reader's scheme. A chart's label says in words what
it shows; the page has the same numbers in a table. Texts that are drawn are escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from hanse_common.federated_report import ReliabilityBin, RocPoint

WIDE, HALF, HEIGHT = 920.0, 460.0, 230.0
SQUARE = 340.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 14.0, 12.0, 40.0

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Point:
    """A figure at `x` with its interval."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A round and how many merchants had each role, from below: (class of the colour, how many)."""

    x: int
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Axis:
    """A vertical axis from `low` to `high`. `percent` writes its numbers as per cent."""

    low: float
    high: float
    percent: bool = False

    def text(self, value: float) -> str:
        """Return how `value` is written at the axis."""
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


def around(points: Sequence[Point], *, percent: bool = False) -> Axis:
    """Return an axis that holds all intervals of `points`, with round ends; a share's within 0 and 1."""
    low, high = min(point.low for point in points), max(point.high for point in points)
    step = _step(max(high - low, 0.02), 4)
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    if bottom == top:
        bottom, top = bottom - step, top + step
    return Axis(max(bottom, 0.0), min(top, 1.0) if percent else top, percent)


def participation(bars: Sequence[Bar], label: str, x_title: str) -> Markup:
    """Return stacked bars, one a round."""
    most = max([1, *(sum(count for _, count in bar.parts) for bar in bars)])
    step = max(1.0, _step(most, 4))
    frame = _Frame(WIDE, HEIGHT, (-0.5, len(bars) - 0.5), (0.0, math.ceil(most / step) * step))
    drawn = [frame.rows(_ticks(0.0, frame.y[1], step), lambda value: f"{value:g}")]
    every = max(1, math.ceil(len(bars) / 10))
    width = frame.across(0.8) - frame.across(0.0)
    for place, bar in enumerate(bars):
        below = 0
        for kind, count in bar.parts:
            if count:
                top, bottom = frame.down(below + count), frame.down(below)
                drawn.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                        kind, _n(frame.across(place - 0.4)), _n(top), _n(width), _n(bottom - top)
                    )
                )
            below += count
        if (len(bars) - 1 - place) % every == 0:
            drawn.append(frame.under(place, str(bar.x)))
    drawn.append(frame.title(x_title))
    return _svg(frame, label, drawn)


def band(points: Sequence[Point], axis: Axis, label: str, x_title: str) -> Markup:
    """Return a line through the figures over the band of their intervals."""
    first, last = points[0].x, points[-1].x
    room = 0.5 if first == last else 0.02 * (last - first)
    frame = _Frame(HALF, HEIGHT, (first - room, last + room), (axis.low, axis.high))
    drawn = [frame.rows(_ticks(axis.low, axis.high, _step(axis.high - axis.low, 4)), axis.text)]
    edge = [(point.x, point.high) for point in points] + [(point.x, point.low) for point in points[::-1]]
    if len(points) > 1:
        drawn.append(Markup('<polygon class="band" points="{}"/>').format(frame.path(edge)))
        line = frame.path((point.x, point.value) for point in points)
        drawn.append(Markup('<polyline class="line" points="{}"/>').format(line))
    for point in points:
        drawn.append(frame.whisker(point.x, point.low, point.high))
        drawn.append(frame.dot(point.x, point.value))
    every = max(1, math.ceil(len(points) / 8))
    for place, point in enumerate(points):
        if (len(points) - 1 - place) % every == 0:
            drawn.append(frame.under(point.x, f"{point.x:g}"))
    drawn.append(frame.title(x_title))
    return _svg(frame, label, drawn, "half")


def roc(
    curves: Sequence[Sequence[RocPoint]], chosen: int | None, label: str, x_title: str, y_title: str
) -> Markup:
    """Return the classes' ROC curves, the `chosen` one in front with the band of its intervals."""
    frame = _Frame(SQUARE, SQUARE, (0.0, 1.0), (0.0, 1.0))
    drawn = [frame.shares(), frame.diagonal()]
    for number, curve in enumerate(curves):
        if curve and number != chosen:
            drawn.append(Markup('<polyline class="other" points="{}"/>').format(frame.path(_corners(curve))))
    if chosen is not None and curves[chosen]:
        curve = curves[chosen]
        high = [(point.false_positive_rate.low, point.true_positive_rate.high) for point in curve]
        low = [(point.false_positive_rate.high, point.true_positive_rate.low) for point in curve]
        around_it = [(0.0, 0.0), *high, (1.0, 1.0), *low[::-1]]
        drawn.append(Markup('<polygon class="band" points="{}"/>').format(frame.path(around_it)))
        drawn.append(Markup('<polyline class="line" points="{}"/>').format(frame.path(_corners(curve))))
    drawn += [frame.title(x_title), frame.title_left(y_title)]
    return _svg(frame, label, drawn, "square")


def reliability(bins: Sequence[ReliabilityBin], label: str, x_title: str, y_title: str) -> Markup:
    """Return how often photos are right, by how sure the recognizer was; on the diagonal is what is honest."""
    frame = _Frame(SQUARE, SQUARE, (0.0, 1.0), (0.0, 1.0))
    drawn = [frame.shares(), frame.diagonal()]
    both = [(one.confidence.value, one.accuracy) for one in bins if one.confidence and one.accuracy]
    shown = sorted(both, key=lambda point: point[0])  # noise may have changed the order of bins
    if len(shown) > 1:
        line = frame.path((score, accuracy.value) for score, accuracy in shown)
        drawn.append(Markup('<polyline class="line" points="{}"/>').format(line))
    for score, accuracy in shown:
        drawn.append(frame.whisker(score, accuracy.low, accuracy.high))
        drawn.append(frame.dot(score, accuracy.value))
    drawn += [frame.title(x_title), frame.title_left(y_title)]
    return _svg(frame, label, drawn, "square")


def shares(parts: Sequence[tuple[str, int]], label: str) -> Markup:
    """Return one bar, divided as `parts` are: (class of the colour, how many)."""
    total = sum(count for _, count in parts)
    drawn = [Markup('<rect class="track" width="100" height="6"/>')]
    at = 0.0
    for kind, count in parts:
        if count:
            width = 100 * count / total
            drawn.append(
                Markup('<rect class="{}" x="{}" width="{}" height="6"/>').format(kind, _n(at), _n(width))
            )
            at += width
    inside = Markup("").join(drawn)
    return Markup(
        '<svg class="meter" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(label, inside)


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a drawing: `x` and `y` are the ends of the axes."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        room = self.width - LEFT - RIGHT
        return LEFT + room * (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)

    def down(self, value: float) -> float:
        room = self.height - TOP - BOTTOM
        part = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return self.height - BOTTOM - room * min(1.0, max(0.0, part))

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{_n(self.across(x))},{_n(self.down(y))}" for x, y in points)

    def rows(self, values: Sequence[float], text: Callable[[float], str]) -> Markup:
        line = Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="end" x="{3}" y="{4}">{5}</text>'
        )
        return Markup("").join(
            line.format(
                _n(LEFT), _n(self.width - RIGHT), _n(self.down(each)),
                _n(LEFT - 6), _n(self.down(each) + 4), text(each),
            )
            for each in values
        )  # fmt: skip

    def shares(self) -> Markup:
        """Both axes from 0 to 100 %."""
        values = [0.0, 0.25, 0.5, 0.75, 1.0]
        upright = Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>')
        columns = Markup("").join(
            upright.format(_n(self.across(each)), _n(TOP), _n(self.height - BOTTOM)) for each in values
        )
        below = Markup("").join(self.under(each, f"{100 * each:g}") for each in values)
        return columns + below + self.rows(values, lambda value: f"{100 * value:g}")

    def diagonal(self) -> Markup:
        return Markup('<polyline class="chance" points="{}"/>').format(self.path([(0, 0), (1, 1)]))

    def under(self, x: float, text: str) -> Markup:
        return Markup('<text class="middle" x="{}" y="{}">{}</text>').format(
            _n(self.across(x)), _n(self.height - BOTTOM + 16), text
        )

    def title(self, text: str) -> Markup:
        middle = (LEFT + self.width - RIGHT) / 2
        return Markup('<text class="middle" x="{}" y="{}">{}</text>').format(
            _n(middle), _n(self.height - 5), text
        )

    def title_left(self, text: str) -> Markup:
        middle = (TOP + self.height - BOTTOM) / 2
        return Markup('<text class="middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(
            _n(middle), text
        )

    def whisker(self, x: float, low: float, high: float) -> Markup:
        return Markup('<line class="whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            _n(self.across(x)), _n(self.down(low)), _n(self.down(high))
        )

    def dot(self, x: float, y: float) -> Markup:
        return Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"/>').format(
            _n(self.across(x)), _n(self.down(y))
        )


def _svg(frame: _Frame, label: str, drawn: Sequence[Markup], kind: str = "") -> Markup:
    return Markup('<svg class="chart{}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        f" {kind}" if kind else "", frame.width, frame.height, escape(label), Markup("").join(drawn)
    )


def _corners(curve: Sequence[RocPoint]) -> list[tuple[float, float]]:
    inner = [(point.false_positive_rate.value, point.true_positive_rate.value) for point in curve]
    return [(0.0, 0.0), *inner, (1.0, 1.0)]


def _step(span: float, count: int) -> float:
    """Return a round step by which about `count` of them are in `span`."""
    least = span / count
    scale = 10.0 ** math.floor(math.log10(least))
    return scale * next(step for step in _STEPS if step * scale >= least * (1 - 1e-9))


def _ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _n(value: float) -> str:
    """Return a coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
