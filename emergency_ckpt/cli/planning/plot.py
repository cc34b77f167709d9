"""What was simulated, as one HTML file with two drawings (SVG) and the assumptions: nothing else is loaded.

All text in it is escaped, whoever wrote it.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from emergency_ckpt.cli.planning.report import ASSUMED_BY_SIMULATION
from emergency_ckpt.cli.planning.request import Asked
from emergency_ckpt.core.forecast.simulation import Simulated, gain

_SHARES = (
    ("useful", "progress", "#2a7f4f"),
    ("saving", "saving", "#e0b13a"),
    ("rolled_back", "done again", "#c8553d"),
    ("down", "down", "#8a8f98"),
)
_LINES = ("#8a8f98", "#3a6ea5", "#2a7f4f")
_WIDTH, _LEFT, _RIGHT = 760, 150, 30
_BAR, _GAP = 34, 22
_HEIGHT = 260


def page(simulated: Sequence[Simulated], asked: Asked, days: float) -> str:
    """The whole file."""
    shape = asked.request.shape
    runs = len(simulated[0].lives)
    title = f"{shape.chips:,} chips, {shape.slices:,} slices of {shape.hosts_per_slice:,} hosts"
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>',
            "<style>body{font:14px sans-serif;max-width:820px;margin:2em auto;color:#222}"
            "td,th{padding:2px 12px 2px 0;text-align:left}svg text{font:12px sans-serif}</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            f"<p>{runs} runs of {days:g} days with the same failures for all; whiskers are 95 % confidence "
            "intervals of the goodput (Student's t).</p>",
            "<h2>Where the time goes</h2>",
            *_bars(simulated),
            "<h2>Progress in the first run</h2>",
            *_progress(simulated, asked.request.step_seconds, days),
            "<h2>Differences</h2><table>",
            *_differences(simulated),
            "</table><h2>What this rests on</h2><table>",
            *(
                f"<tr><td>{_text(each.name)}</td><td>{_text(each.value)}</td><td>{_text(each.source)}</td></tr>"
                for each in asked.assumptions
            ),
            "</table><ul>",
            *(f"<li>{_text(each)}</li>" for each in ASSUMED_BY_SIMULATION),
            "</ul></body></html>",
            "",
        ]
    )


def _bars(simulated: Sequence[Simulated]) -> Iterator[str]:
    height = len(simulated) * (_BAR + _GAP) + 50
    yield f'<svg width="{_WIDTH}" height="{height}" role="img" aria-label="shares of the time">'
    for row, each in enumerate(simulated):
        top, at = row * (_BAR + _GAP) + 8, 0.0
        yield f'<text x="0" y="{top + _BAR / 2 + 4:.1f}">{_text(each.policy)}</text>'
        for name, _, colour in _SHARES:
            share = max(0.0, each.share(name).mean)
            yield (
                f'<rect x="{_x(at):.2f}" y="{top}" width="{_x(share) - _LEFT:.2f}" height="{_BAR}" '
                f'fill="{colour}"/>'
            )
            at += share
        goodput = each.goodput
        low, high, middle = _x(max(0.0, goodput.low)), _x(min(1.0, goodput.high)), top + _BAR / 2
        yield (
            f'<path d="M{low:.2f} {middle}H{high:.2f}M{low:.2f} {middle - 6}v12M{high:.2f} {middle - 6}v12" '
            'stroke="#111" stroke-width="1.5" fill="none"/>'
        )
        yield (
            f'<text x="{_LEFT}" y="{top + _BAR + 14}">{goodput.mean:.2%} ± {goodput.half_width:.2%} '
            f"(periods {each.periods.local or '-'} / {each.periods.persistent} steps)</text>"
        )
    for place, (_, word, colour) in enumerate(_SHARES):
        x, y = _LEFT + place * 130, height - 16
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17}" y="{y + 11}">{_text(word)}</text>'
    yield "</svg>"


def _progress(simulated: Sequence[Simulated], step_seconds: float, days: float) -> Iterator[str]:
    seconds = days * 86400
    yield f'<svg width="{_WIDTH}" height="{_HEIGHT + 60}" role="img" aria-label="steps over time">'
    yield f'<path d="M{_LEFT} 8V{_HEIGHT}H{_WIDTH - _RIGHT}" stroke="#222" fill="none"/>'
    yield f'<path d="M{_LEFT} {_HEIGHT}L{_WIDTH - _RIGHT} 8" stroke="#bbb" stroke-dasharray="4 4"/>'
    for place, (each, colour) in enumerate(zip(simulated, _LINES, strict=False)):
        points = " ".join(
            f"{_x(t / seconds):.1f},{_HEIGHT - (_HEIGHT - 8) * step * step_seconds / seconds:.1f}"
            for t, step in each.lives[0].points
        )
        yield f'<polyline points="{points}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
        y = _HEIGHT + 40
        yield f'<rect x="{_LEFT + place * 170}" y="{y}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{_LEFT + place * 170 + 17}" y="{y + 11}">{_text(each.policy)}</text>'
    yield f'<text x="0" y="20">{seconds / step_seconds:,.0f} steps</text>'
    yield f'<text x="{_WIDTH - _RIGHT - 60}" y="{_HEIGHT + 18}">{days:g} days</text></svg>'


def _differences(simulated: Sequence[Simulated]) -> Iterator[str]:
    ours = simulated[-1]
    for other in simulated[:-1]:
        more = gain(ours, other)
        yield (
            f"<tr><td>{_text(ours.policy)} - {_text(other.policy)}</td>"
            f"<td>{more.mean * 100:+.2f} ± {more.half_width * 100:.2f} % of the time</td></tr>"
        )


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
