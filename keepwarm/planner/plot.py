"""Cost by class for every scheme and lifetime, as one HTML file that needs nothing else.

One bar a row, as a share of what the same traffic costs without caching at the same prices, so that schemes in different
currencies can stand side by side. Names come from files, so they are escaped.
"""

from html import escape

from keepwarm.billing.sheet import decimal_text
from keepwarm.planner.plan import Plan, Row

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 210, 90, 22, 10, 30  # px
CLASSES = (
    ("fresh", "#868e96"),
    ("read", "#0b7285"),
    ("write", "#e8590c"),
    ("creation", "#f08c00"),
    ("storage", "#5f3dc4"),
    ("call", "#a61e4d"),
    ("output", "#ced4da"),
)
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>keepwarm plan</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}}
svg{{max-width:100%;height:auto}} text{{font:12px system-ui,sans-serif;fill:#495057}}</style>
<h1>{log}: cost by caching scheme</h1>
<p>{n_requests:,} requests, {n_tokens:,} prompt tokens. 100 % is the same traffic at the same prices without caching.</p>
{figure}
</html>
"""


def page(plan: Plan) -> str:
    """The whole HTML file."""
    return PAGE.format(
        log=escape(plan.log), n_requests=plan.n_requests, n_tokens=plan.n_tokens, figure=_figure(plan.rows)
    )


def _figure(rows: tuple[Row, ...]) -> str:
    share_max = max((row.total_nano / row.none_nano for row in rows if row.none_nano), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / max(1.0, share_max)
    height = TOP + len(rows) * (BAR + GAP) + GAP
    parts = []
    for i, (name, colour) in enumerate(CLASSES):
        parts.append(f'<rect x="{LEFT + 80 * i}" y="4" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 80 * i + 16}" y="14">{name}</text>')
    for i, row in enumerate(rows):
        parts += _bar(row, TOP + i * (BAR + GAP), scale)
    x = LEFT + scale
    parts.append(f'<path d="M{x:.1f} {TOP - 4}V{height}" stroke="#212529" stroke-dasharray="3 3"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="Cost by caching scheme">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _bar(row: Row, y: int, scale: float) -> list[str]:
    label = escape(f"{row.scheme} {row.ttl}")
    parts = [f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{label}</text>']
    x = float(LEFT)
    for name, colour in CLASSES:
        nano = getattr(row, f"{name}_nano")
        if not nano or not row.none_nano:
            continue
        width = nano / row.none_nano * scale
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" fill="{colour}"><title>{label}: {name} '
            f"{decimal_text(nano)} {escape(row.currency)}</title></rect>"
        )
        x += width
    share = f"{100 * row.total_nano / row.none_nano:.1f} %" if row.none_nano else "no cost"
    parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{share}</text>')
    return parts
