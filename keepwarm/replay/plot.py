"""Hit rate against capacity, a line per policy, as one HTML file that needs nothing else.

One figure per trace, drawn as SVG by hand: a dozen points need no library. Capacity is on a logarithmic axis, hit rates
begin at 0, and every point says its numbers when it is pointed at. Names come from file names, so they are escaped.
"""

from collections.abc import Sequence
from html import escape
from math import log10

from msgspec import Struct

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 120, 20, 50  # px
COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#868e96")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>keepwarm replay</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
svg{{max-width:100%;height:auto}} text{{font:12px system-ui,sans-serif;fill:#495057}}</style>
<h1>Token hit rate against capacity</h1>
{figures}
</html>
"""


class Point(Struct, frozen=True):
    """What one policy read of one trace at one capacity; the rate is a share of 1."""

    trace: str
    policy: str
    capacity_tokens: int
    hit_rate: float


def page(points: Sequence[Point]) -> str:
    """The whole HTML file."""
    traces = dict.fromkeys(point.trace for point in points)
    figures = "\n".join(_figure(trace, [point for point in points if point.trace == trace]) for trace in traces)
    return PAGE.format(figures=figures)


def shown_tokens(n_tokens: int) -> str:
    """1M, 5.1M, 64k."""
    for unit, letter in ((1_000_000, "M"), (1000, "k")):
        if n_tokens >= unit:
            return f"{n_tokens / unit:.4g}{letter}"
    return str(n_tokens)


def _figure(trace: str, points: Sequence[Point]) -> str:
    capacities = sorted({point.capacity_tokens for point in points})
    low, high = log10(capacities[0]), log10(capacities[-1])
    rate_max = max(0.1, *(point.hit_rate for point in points))

    def x(n_tokens: int) -> float:
        share = (log10(n_tokens) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - rate / rate_max * (HEIGHT - TOP - BOTTOM)

    parts = []
    for step in range(5):
        rate = rate_max * step / 4
        parts.append(f'<path d="M{LEFT} {y(rate):.1f}H{WIDTH - RIGHT}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{100 * rate:.0f} %</text>')
    for capacity in capacities:
        label = shown_tokens(capacity)
        parts.append(f'<text x="{x(capacity):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">capacity in tokens</text>')
    for i, policy in enumerate(dict.fromkeys(point.policy for point in points)):
        own = sorted((p for p in points if p.policy == policy), key=lambda point: point.capacity_tokens)
        line = [(x(point.capacity_tokens), y(point.hit_rate), point) for point in own]
        parts.append(_line(policy, line, COLOURS[i % len(COLOURS)]))
    return (
        f'<h2>{escape(trace)}</h2>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="Token hit rates of {escape(trace)}">\n' + "\n".join(parts) + "\n</svg>"
    )


def _line(policy: str, points: Sequence[tuple[float, float, Point]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(policy)} at '
        f"{shown_tokens(point.capacity_tokens)} tokens: {100 * point.hit_rate:.1f} %</title></circle>"
        for x, y, point in points
    )
    last_x, last_y, _ = points[-1]
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'
        f'<text x="{last_x + 10:.1f}" y="{last_y + 4:.1f}" style="fill:{colour}">{escape(policy)}</text>'
    )
