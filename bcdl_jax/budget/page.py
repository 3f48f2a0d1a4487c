"""A page of HTML about a compressed network, complete in itself: no script, no file beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

from bcdl_jax.budget.compressed import CompressionReport, EntryReport
from bcdl_jax.budget.errors import Increase
from bcdl_jax.budget.search import Point, pareto_front

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --page: #ffffff; --card: #f5f7f9; --one: #2563a8;
  --two: #b3541e; --bar: #c9d9ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --line: #3a424b; --page: #14181c; --card: #1d2329;
  --one: #7fb3e6; --two: #f0a06a; --bar: #2c4a66; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } p { max-width: 46rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.4rem; } .tile span, figcaption, .note { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td .bar { display: inline-block; height: .7rem; background: var(--bar); }
figure { margin: 0; } .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } .curve { min-width: 34rem; } svg text { fill: var(--soft); font-size: 12px; } .axis { stroke: var(--line); }
.front { fill: none; stroke: var(--one); stroke-width: 2; } .point { fill: var(--one); opacity: .45; } .chosen { fill: var(--two); }
.kept { fill: var(--one); } .gone { fill: var(--two); }
"""


def report_page(report: CompressionReport, title: str = "Compressed network") -> str:
    """The page: sizes and errors, the curve of error against bytes, layers, and scores.

    Args:
      report: The report.
      title: The title of the page.
    """
    name = html.escape(title)
    sections = [
        f"<h1>{name}</h1><p class='note'>Budget: {html.escape(report.budget)}</p>",
        _tiles(report),
        _curve(report),
        _entries(report.entries),
        _scores([entry for entry in report.entries if entry.scores.size]),
    ]
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{name}</title>"
        f"<style>{_STYLE}</style>"
    )
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def _tiles(report: CompressionReport) -> str:
    (before, after), (work, less), (kept, total) = report.bytes, report.multiply_adds, report.kept_weights
    tiles = [
        (f"{after:,} bytes", f"coded weights, {before / max(1, after):.1f} times fewer than {before:,}"),
        (f"{less:,}", f"multiply-adds on two examples, {work / max(1, less):.1f} times fewer than {work:,}"),
        (f"{kept / max(1, total):.0%}", f"of the weights of the layers are kept: {kept:,} of {total:,}"),
        (f"{report.held_out[1].error:.4g}", _words("error on held-out data", *report.held_out)),
        (f"{report.error[1].error:.4g}", _words("error on the data of the search", *report.error)),
    ]
    return (
        "<div class='tiles'>"
        + "".join(f"<div class='tile'><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _words(what: str, before: float, after: Increase) -> str:
    return (
        f"{what}, {before:.4g} before; the increase of {after.increase:+.2g} has a standard error of {after.standard_error:.2g} "
        f"({after.examples:,} examples)"
    )


# The curve.

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 300, 64, 44, 12


def _curve(report: CompressionReport) -> str:
    points = list(report.points)
    highest = _highest_error(report)
    shown = [point for point in points if point.increase.error <= highest] or points
    low, high = (math.log(limit([point.bytes for point in shown])) for limit in (min, max))
    bottom = min(point.increase.error for point in shown)
    top = max(highest, bottom + 1e-12)

    def place(point: Point) -> tuple[float, float]:
        across = (math.log(point.bytes) - low) / max(high - low, 1e-9)
        up = (point.increase.error - bottom) / (top - bottom)
        return _LEFT + across * (_WIDTH - _LEFT - 16), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    front = [place(point) for point in pareto_front(shown)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    dots = "".join(f"<circle class='point' cx='{x:.1f}' cy='{y:.1f}' r='3'/>" for x, y in map(place, shown))
    x, y = place(report.chosen)
    chosen = f"<circle class='chosen' cx='{x:.1f}' cy='{y:.1f}' r='6'><title>{report.chosen.bytes:,.0f} bytes</title></circle>"
    axes = _axes(low, high, bottom, top)
    return (
        "<h2>Error against bytes</h2><figure><div class='wide'><svg class='curve' viewBox='0 0 640 300' role='img' aria-label='Error against bytes'>"
        f"{axes}<polyline class='front' points='{line}'/>{dots}{chosen}</svg></div><figcaption>Each dot is a network that the search measured, on "
        f"{report.error[1].examples:,} examples. The line joins those of which none is both smaller and better. The large dot is the chosen "
        "one. Sizes of the other ones are estimates.</figcaption></figure>"
    )


def _highest_error(report: CompressionReport) -> float:
    """The highest error that the plot shows: a few times the increase of the chosen point."""
    before, chosen = report.error[0], report.chosen.increase
    spread = max(abs(chosen.increase), 2 * chosen.standard_error, 1e-3 * abs(before))
    return max(before, chosen.error) + 3 * spread


def _axes(low: float, high: float, bottom: float, top: float) -> str:
    right, base = _WIDTH - 16, _HEIGHT - _BOTTOM
    parts = [
        f"<line class='axis' x1='{_LEFT}' y1='{base}' x2='{right}' y2='{base}'/>",
        f"<line class='axis' x1='{_LEFT}' y1='{_TOP}' x2='{_LEFT}' y2='{base}'/>",
        f"<text x='{(_LEFT + right) / 2}' y='{_HEIGHT - 6}' text-anchor='middle'>bytes</text>",
        f"<text x='14' y='{(_TOP + base) / 2}' text-anchor='middle' transform='rotate(-90 14 {(_TOP + base) / 2})'>error</text>",
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + share * (right - _LEFT), base - share * (base - _TOP)
        size = math.exp(low + share * (high - low))
        anchor = "end" if share == 1 else "middle"
        parts.append(f"<text x='{x:.1f}' y='{base + 18}' text-anchor='{anchor}'>{float(f'{size:.3g}'):,.0f}</text>")
        parts.append(
            f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{bottom + share * (top - bottom):.4g}</text>"
        )
    return "".join(parts)


# The layers.


def _entries(entries: Sequence[EntryReport]) -> str:
    largest = max((entry.bytes for entry in entries), default=1.0) or 1.0
    rows = "".join(_row(entry, largest) for entry in entries)
    head = "".join(f"<th>{text}</th>" for text in ("entry", "shape", "small shape", "units kept", "bits", "bytes", ""))
    return (
        f"<h2>Layers and arrays</h2><div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<p class='note'>Bits are the width of an integer. The coder stores integers in fewer bits on average. Arrays without units have no "
        "posterior.</p>"
    )


def _row(entry: EntryReport, largest: float) -> str:
    units = f"{int(entry.kept.sum()):,} of {entry.kept.size:,}" if entry.is_layer else ""
    bits = f"{entry.bits}" if entry.is_rounded else f"{entry.bits}, not rounded"
    bar = f"<span class='bar' style='width:{6 * entry.bytes / largest:.2f}rem'></span>"
    shapes = (" x ".join(map(str, shape)) or "scalar" for shape in (entry.shape, entry.small_shape))
    cells = [html.escape(entry.name), *shapes, units, bits, f"{entry.bytes:,.0f}", bar]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


# The scores.

_BINS, _SMALL_WIDTH, _SMALL_HEIGHT = 24, 240, 110


def _scores(entries: Iterable[EntryReport]) -> str:
    figures = "".join(_histogram(entry) for entry in entries)
    if not figures:
        return ""
    return (
        f"<h2>Scores of the units</h2><p class='note'>High scores have more noise than signal. Units in "
        f"<b style='color:var(--one)'>blue</b> are kept, those in <b style='color:var(--two)'>orange</b> are pruned.</p>"
        f"<div class='grid'>{figures}</div>"
    )


def _histogram(entry: EntryReport) -> str:
    finite = np.clip(np.nan_to_num(entry.scores, posinf=50, neginf=-50), -50, 50)
    edges = np.linspace(finite.min() - 1e-6, finite.max() + 1e-6, _BINS + 1)
    kept, gone = (np.histogram(finite[flags], edges)[0] for flags in (entry.kept, ~entry.kept))
    scale = (_SMALL_HEIGHT - 24) / max(1, int((kept + gone).max()))
    width, base = _SMALL_WIDTH / _BINS, _SMALL_HEIGHT - 18
    bars = []
    for number, (one, other) in enumerate(zip(kept, gone, strict=True)):
        low = base
        for count, name in ((one, "kept"), (other, "gone")):
            if count:
                low -= count * scale
                bars.append(
                    f"<rect class='{name}' x='{number * width + 0.5:.1f}' y='{low:.1f}' width='{width - 1:.1f}' height='{count * scale:.1f}'/>"
                )
    ends = (
        f"<text x='0' y='{_SMALL_HEIGHT - 4}'>{edges[0]:.1f}</text>"
        f"<text x='{_SMALL_WIDTH}' y='{_SMALL_HEIGHT - 4}' text-anchor='end'>{edges[-1]:.1f}</text>"
    )
    name = html.escape(entry.name)
    return (
        f"<figure><svg viewBox='0 0 {_SMALL_WIDTH} {_SMALL_HEIGHT}' role='img' aria-label='Scores of {name}'>{''.join(bars)}{ends}</svg>"
        f"<figcaption>{name}: {int(entry.kept.sum()):,} of {entry.kept.size:,} units</figcaption></figure>"
    )
