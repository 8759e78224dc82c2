"""Figures over the blocks of the model: noise, ranges of activations, keys and values per head."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from quantbench.reports.figures import INK, MAP, MUTED, Report, canvas, series_of, svg
from quantbench.reports.formatting import plain


def sqnr(report: Report) -> str | None:
    """Per block: signal to noise of the hidden state as served, and of the noisiest linear."""
    served = {
        name: [(i, layer["sqnr_served_db"]) for i, layer in enumerate(record["parity"]["layers"])]
        for name, record in report["variants"].items()
        if record["parity"]
    }
    linears = {name: _lowest_per_block(record) for name, record in report["variants"].items() if record["layers"]}
    panels = [("Hidden state after each block, served", served), ("Noisiest linear of each block", linears)]
    panels = [(title, lines) for title, lines in panels if any(lines.values())]
    if not panels:
        return None
    figure, grid = canvas(9.6, 3.7, 1, len(panels), sharey=False)
    series = series_of(report)
    for axes, (title, lines) in zip(grid, panels, strict=True):
        for name, line in lines.items():
            known = [(x, min(y, SQNR_SHOWN)) for x, y in line if y is not None]
            if not known:
                continue
            style = series[name]
            look: dict[str, Any] = {
                "color": style.color,
                "marker": style.marker,
                "linestyle": style.dashes,
                "markersize": 3.4,
            }
            axes.plot(*zip(*known, strict=True), label=name, **look)
        axes.set_title(title)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("SQNR, dB (higher is better)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return svg(figure, "sqnr", "Signal to quantization noise ratio per block and variant")


SQNR_SHOWN = 80.0  # a float variant is exact: its line is cut here so that the others can be read


def _lowest_per_block(record: dict[str, Any]) -> list[tuple[int, float | None]]:
    lowest: dict[int, float] = {}
    for layer in record["layers"].values():
        if layer["block"] is not None and layer["worst_db"] is not None:
            lowest[layer["block"]] = min(layer["worst_db"], lowest.get(layer["block"], np.inf))
    return sorted(lowest.items())


TAP_TITLES = {
    "attn_in": "Input of q, k, v (attn_in)",
    "o_in": "Input of o_proj (o_in)",
    "mlp_in": "Input of gate, up (mlp_in)",
    "down_in": "Input of down_proj (down_in)",
}


def activation_ranges(report: Report) -> str | None:
    """Largest value and 99.9 percentile of every tap per block, before and after the transforms."""
    before, after = report["ranges"]["float"], report["ranges"]["after"]
    taps = [tap for tap in TAP_TITLES if tap in before or any(tap in lines for lines in after.values())]
    if not taps:
        return None
    figure, grid = canvas(6.4, 4.3, -(-len(taps) // 2), min(2, len(taps)), sharex=True)
    series = series_of(report)
    for axes, tap in zip(grid, taps, strict=False):
        _range_panel(axes, before.get(tap), MUTED, "float model")
        for variant, lines in after.items():
            _range_panel(axes, lines.get(tap), series[variant].color, variant)
        _name_outliers(axes, before.get(tap))
        axes.set_yscale("log")
        axes.set_title(TAP_TITLES[tap])
        axes.margins(y=0.16)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value, 1)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(taps) :]:
        axes.set_visible(False)
    for axes in grid[len(taps) - min(2, len(taps)) : len(taps)]:
        axes.set_xlabel("block")
    figure.legend(*_range_legend(grid[0], after), loc="outside lower center", ncols=3)
    return svg(figure, "activation-ranges", "Largest values and 99.9 percentiles of the activations per block")


def _range_panel(axes: Axes, line: dict[str, Any] | None, color: str, label: str) -> None:
    if line is None:
        return
    positive = [v if v else np.nan for v in line["absmax"]]
    axes.plot(line["blocks"], positive, color=color, marker="o", markersize=3, label=f"largest, {label}")
    usual = [v if v else np.nan for v in line["p999"]]
    if not np.all(np.isnan(usual)):
        axes.plot(line["blocks"], usual, color=color, linestyle=(0, (2, 1.5)), label=f"99.9% below, {label}")


def _range_legend(axes: Axes, after: dict[str, Any]) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return (handles, labels) if after else (handles, [label.removesuffix(", float model") for label in labels])


def _name_outliers(axes: Axes, line: dict[str, Any] | None) -> None:
    """Block and value at the three points that stand out most over their own 99.9 percentile."""
    if line is None:
        return
    ratios = [
        (absmax / usual, block, absmax)
        for block, absmax, usual in zip(line["blocks"], line["absmax"], line["p999"], strict=True)
        if usual
    ]
    for ratio, block, absmax in sorted(ratios, reverse=True)[:3]:
        if ratio >= 8:
            late = block > 0.7 * max(line["blocks"])
            axes.annotate(f"{plain(absmax)}", (block, absmax), xytext=(-5 if late else 5, 0), color=INK, fontsize=8.5,
                          textcoords="offset points", ha="right" if late else "left", va="center")  # fmt: skip


def cache_heads(report: Report) -> str | None:
    """Largest K and V per head and block."""
    parts = report["cache_ranges"]
    if not parts:
        return None
    heads = max(len(row) for rows in parts.values() for row in rows)
    figure, grid = canvas(9.6, min(6.0, 1.7 + 0.16 * heads), 1, len(parts))
    for axes, (part, rows) in zip(grid, parts.items(), strict=True):
        image = axes.imshow(np.array(rows).T, aspect="auto", cmap=MAP, interpolation="nearest", origin="lower")
        axes.set_title({"k": "Keys after RoPE", "v": "Values"}[part] + ", largest value")
        axes.set_xlabel("block")
        axes.set_ylabel("KV head")
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=axes)
        bar.outline.set_visible(False)
    return svg(figure, "cache-heads", "Largest key and value per head and block")
