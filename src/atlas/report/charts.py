"""Curves as SVG, in the colours of the page; every text of a run is escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 24  # around the curves
MOST_POINTS = 300  # of a curve: more are thinned out to their means
MOST_DOTS = 40
COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """Points to connect."""

    label: str
    points: Sequence[tuple[float, float]]  # by x
    dashed: bool = False  # the other run, or an earlier evaluation
    colour: int = 0


def chart(title: str, curves: Sequence[Curve]) -> str:
    """The curves in one figure, as HTML; nothing if no curve has two points."""
    curves = [curve for curve in curves if curve.points]
    if not any(len(curve.points) > 1 for curve in curves):
        return ""
    points = [point for curve in curves for point in curve.points]
    horizontal = Axis.over([x for x, _ in points], LEFT, WIDTH - RIGHT, whole=True)
    vertical = Axis.over([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(horizontal, vertical), *(_curve(curve, horizontal, vertical) for curve in curves)]
    legend = "".join(
        f'<li><svg viewBox="0 0 18 6" aria-hidden="true"><path class="c{curve.colour}{" dashed" * curve.dashed}" '
        f'd="M0 3H18"/></svg>{escape(curve.label)}</li>'
        for curve in curves
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


@dataclass(frozen=True)
class Axis:
    """Where a value lies in the figure, and the values to write beside it."""

    low: float
    high: float
    start: float  # where `low` lies
    end: float
    ticks: Sequence[float]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, whole: bool = False) -> "Axis":
        """An axis over all values.

        Args:
            whole: it ends at the values themselves, with whole numbers beside it; else it ends at round numbers, and
                begins at 0 where that is not far.
        """
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        if not whole and 0 < low < high / 2:
            low = 0.0
        step = _nice((high - low) / 4)
        if whole:
            step = max(1, step)
        else:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
        return cls(low, high, start, end, ticks)

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _nice(size: float) -> float:
    """1, 2 or 5 times a power of ten, the first that is not smaller."""
    power = 10 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def number(value: float) -> str:
    """A number as a person writes it: at most four digits that count, thousands with commas."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _grid(horizontal: Axis, vertical: Axis) -> str:
    lines = [
        f'<path class="grid" d="M{LEFT} {vertical.at(y):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{vertical.at(y) + 4:.1f}" text-anchor="end">{number(y)}</text>'
        for y in vertical.ticks
    ]
    lines += [
        f'<text x="{horizontal.at(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number(x)}</text>'
        for x in horizontal.ticks
    ]
    return "".join(lines)


def _curve(curve: Curve, horizontal: Axis, vertical: Axis) -> str:
    points = _thinned(curve.points)
    places = [f"{horizontal.at(x):.1f} {vertical.at(y):.1f}" for x, y in points]
    style = f"c{curve.colour}{' dashed' if curve.dashed else ''}"
    drawn = [f'<path class="{style}" d="M{"L".join(places)}"/>']
    if len(points) <= MOST_DOTS:
        for (x, y), place in zip(points, places, strict=True):
            cx, cy = place.split(" ")
            said = f"{escape(curve.label)}, {number(x)}: {number(y)}"
            drawn.append(f'<circle class="{style}" cx="{cx}" cy="{cy}" r="2.6"><title>{said}</title></circle>')
    return "".join(drawn)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `MOST_POINTS`: the means of neighbours."""
    each = -(-len(points) // MOST_POINTS)
    if each < 2:
        return points
    parts = [points[i : i + each] for i in range(0, len(points), each)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
