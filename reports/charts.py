"""The figures of the report, each a function from the report to an SVG element or None where nothing was measured.

Those that compare variants are here, those that go through the blocks of the model in block_charts.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from quantbench.reports.block_charts import activation_ranges, cache_heads, sqnr
from quantbench.reports.figures import INK, PALETTE, STYLE, Report, canvas, series_of, svg
from quantbench.reports.formatting import percent, plain
from quantbench.reports.terminal import first_batch

Chart = Callable[[Report], "str | None"]


def charts(report: Report, shown: Iterable[str]) -> dict[str, str]:
    """{name: SVG} of every figure in `shown` that `report` has numbers for."""
    with matplotlib.rc_context(STYLE):
        drawn = {name: CHARTS[name](report) for name in shown}
    return {name: text for name, text in drawn.items() if text is not None}


def accuracy_speed(report: Report) -> str | None:
    """Perplexity increase over decode speed, one mark per variant, its area the checkpoint's size."""
    batch = first_batch(report)
    points = {name: point for name, record in report["variants"].items() if (point := _point(record, batch))}
    if len(points) < 2 or all(record["baseline"] for record in map(report["variants"].__getitem__, points)):
        return None
    figure, (axes,) = canvas(6.4, 4.3)
    series = series_of(report)
    for name, (speed, increase, bounds, size) in points.items():
        style = series[name]
        if bounds:
            axes.plot([speed, speed], [100 * b for b in bounds], color=style.color, linewidth=1.2, alpha=0.7)
        area = 40 + 260 * size
        axes.scatter(speed, 100 * increase, s=area, color=style.color, marker=style.marker, alpha=0.9, linewidths=0)
    _percent_axis(axes, [100 * p[1] for p in points.values()])
    _label_points(figure, axes, {name: (p[0], 100 * p[1]) for name, p in points.items()})
    limits = {g["limit"] for g in report["gates"] if g["name"] == "perplexity_increase"}
    for limit in sorted(limits):
        axes.axhline(100 * limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"gate {percent(limit)}", (0.01, 100 * limit), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", fontsize=8.5, color=INK)  # fmt: skip
    axes.set_xlabel(f"decode at batch {batch}, tokens per second (further right is faster)")
    axes.set_ylabel("perplexity increase (lower is better)")
    axes.margins(x=0.16)
    return svg(figure, "accuracy-speed", "Perplexity increase against decode speed, per variant")


def _point(record: dict[str, Any], batch: str | None) -> tuple[float, float, Any, float] | None:
    decode, scores = record["speed"]["decode"].get(batch), record["accuracy"]["perplexity"]
    if decode is None or not scores:
        return None
    increase = scores[0]["increase"] if scores[0]["increase"] is not None else 0.0
    size = record["size"]["ratio_to_fp32"]
    return decode["tokens_per_s"]["median"], increase, scores[0]["increase_interval"], 0.3 if size is None else size


def _percent_axis(axes: Axes, values: list[float]) -> None:
    """Linear near zero and logarithmic above 5%, so that a disaster does not flatten everything else."""
    if max(values) > 12:
        axes.set_yscale("symlog", linthresh=5, linscale=1.2)
        ticks = [t for t in (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 10000) if t <= max(values) * 1.5]
        axes.set_yticks(ticks)
        axes.set_ylim(min(-0.7, min(values) * 1.3), max(values) * 2.2)
        axes.minorticks_off()
    else:
        axes.margins(y=0.18)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0"))


def _label_points(figure: Figure, axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside the marks, moved down or up by the least that keeps them apart and inside (pixels, from the top)."""
    figure.draw_without_rendering()
    pixel = {name: axes.transData.transform(point) for name, point in points.items()}
    placed: list[tuple[float, float, float]] = []  # left, right, height of every label so far
    middle, floor = axes.transAxes.transform((0.62, 0))
    for name in sorted(points, key=lambda n: -pixel[n][1]):
        x, y = pixel[name]
        width = LETTER_PX * len(name)
        left, right = (x - 16 - width, x) if x > middle else (x, x + 16 + width)
        beside = [other for start, end, other in placed if left < end and start < right]
        y = next(
            y + step for step in _steps() if y + step > floor and all(abs(y + step - o) >= LINE_PX for o in beside)
        )
        placed.append((left, right, y))
        offset = (-11 if x > middle else 11, (y - pixel[name][1]) * 72 / figure.dpi)
        axes.annotate(name, points[name], xytext=offset, textcoords="offset points", fontsize=9, color=INK,
                      ha="right" if x > middle else "left", va="center")  # fmt: skip


def _steps() -> Iterator[float]:
    """0, -3, 3, -6, 6, …"""
    yield 0.0
    for distance in itertools.count(3, 3):
        yield -float(distance)
        yield float(distance)


LETTER_PX, LINE_PX = 7.5, 15  # of a 9 point label at 100 dots per inch


def memory(report: Report) -> str | None:
    """Checkpoint bytes by kind, the KV cache, and the process at its peak."""
    records = {n: r for n, r in report["variants"].items() if r["size"]["checkpoint_bytes"] or r["size"]["by_kind"]}
    if not records:
        return None
    kinds = sorted({kind for r in records.values() for kind in r["size"]["by_kind"]})
    figure, (axes,) = canvas(9.6, 1.4 + 0.36 * len(records))
    at = np.arange(len(records))[::-1]
    left = np.zeros(len(records))
    parts = [(kind, [r["size"]["by_kind"].get(kind, 0) for r in records.values()]) for kind in kinds]
    parts = parts or [("checkpoint", [r["size"]["checkpoint_bytes"] for r in records.values()])]
    parts += [("KV cache", [r["size"]["cache_bytes"] or 0 for r in records.values()])]
    for index, (kind, values) in enumerate(parts):
        width = np.array(values, float) / 1e6
        if width.any():
            axes.barh(at, width, left=left, height=0.62, color=PALETTE[index % len(PALETTE)], label=kind)
            left += width
    peaks = [(r["size"]["peak_rss_bytes"], y) for r, y in zip(records.values(), at, strict=True)]
    known = [(value / 1e6, float(y)) for value, y in peaks if value]
    if known:
        across, up = zip(*known, strict=True)
        axes.scatter(across, up, marker="|", s=180, color=INK, linewidths=1.8, label="process at its peak")
    axes.set_yticks(at, list(records))
    axes.tick_params(axis="y", colors=INK, length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MB")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return svg(figure, "memory", "Size of weights, KV cache and process per variant")


def throughput(report: Report) -> str | None:
    """Tokens per second per variant, with a mark where the machine's ceiling is."""
    batches = sorted({b for r in report["variants"].values() for b in r["speed"]["decode"]}, key=int)
    shown = [("Prefill", "prefill")] if any(r["speed"]["prefill"] for r in report["variants"].values()) else []
    shown += [(f"Decode, batch {b}", b) for b in dict.fromkeys([*batches[:1], *batches[-1:]])]
    if not shown:
        return None
    names = list(report["variants"])
    figure, grid = canvas(9.6, 1.3 + 0.36 * len(names), 1, len(shown), sharey=True)
    series = series_of(report)
    at = np.arange(len(names))[::-1]
    for axes, (title, key) in zip(grid, shown, strict=True):
        for y, name in zip(at, names, strict=True):
            _pace_bar(axes, y, _paced(report["variants"][name], key), series[name].color)
        axes.set_title(title)
        axes.set_xlabel("tokens per second")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.34)
        axes.set_xlim(left=0)
    grid[0].set_yticks(at, names)
    for axes in grid:
        axes.tick_params(axis="y", colors=INK, length=0)
    return svg(figure, "throughput", "Tokens per second per variant, against the measured ceiling")


def _paced(record: dict[str, Any], key: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = (
        record["speed"]["prefill"] if key == "prefill" else record["speed"]["decode"].get(key)
    )
    return found


def _pace_bar(axes: Axes, y: float, paced: dict[str, Any] | None, color: str) -> None:
    if paced is None:
        return
    speed, share = paced["tokens_per_s"]["median"], paced["share_of_ceiling"]
    axes.barh(y, speed, height=0.62, color=color)
    end = speed
    if share:
        end = max(speed, speed / share)
        axes.plot([speed / share] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1.8)
    text = plain(speed) + (f" ({percent(share)})" if share else "")
    axes.annotate(text, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)


CHARTS: dict[str, Chart] = {
    "accuracy_speed": accuracy_speed,
    "activation_ranges": activation_ranges,
    "sqnr": sqnr,
    "throughput": throughput,
    "memory": memory,
    "cache_heads": cache_heads,
}
