"""How every figure looks, and how it becomes SVG inside the page.

Figures are drawn without pyplot, so there is no global state, and the same report gives the same bytes. Ink, grid and
muted text are drawn in marker colours that become CSS variables: one figure serves light, dark and print. Series
colours are those of Okabe and Ito (2008), told apart by all common kinds of colour vision; each variant has a marker
as well.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Report = dict[str, Any]

INK, MUTED, LINE = "#1a1b1c", "#6b6c6d", "#d9dadb"  # stand-ins, never seen: see _VARIABLES
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#b8860b")
FLOAT_GREYS = ("#7f8790", "#a9b0b7", "#5c636a")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
MAP = "cividis"  # perceptually even, made for colour-blind readers
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantbench",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Series:
    """How one variant is drawn, in every figure."""

    color: str
    marker: str
    dashes: str


def series_of(report: dict[str, Any]) -> dict[str, Series]:
    """{variant: Series}: greys for float variants, palette colours for quantized ones, in the report's order."""
    chosen: dict[str, Series] = {}
    floats = quantized = 0
    for name, record in report["variants"].items():
        if record["quantized"]:
            color, quantized = PALETTE[quantized % len(PALETTE)], quantized + 1
        else:
            color, floats = FLOAT_GREYS[floats % len(FLOAT_GREYS)], floats + 1
        index = len(chosen)
        dashes = "-" if index < len(MARKERS) else "--"
        chosen[name] = Series(color, MARKERS[index % len(MARKERS)], dashes)
    return chosen


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of width x height inches and its axes, row by row. Call inside `matplotlib.rc_context(STYLE)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [axes for row in grid for axes in row]


def svg(figure: Figure, name: str, description: str) -> str:
    """`figure` as an <svg> element for inlining: ids made unique by `name`, colours as CSS variables, scalable."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'href="#{name}-\2"', text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"font: ((?:[\w.]+ )*?[\d.]+px)[^;\"]*", r"font: \1 var(--sans)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return _opening(text, name, description)


def _opening(text: str, name: str, description: str) -> str:
    """Replaces the <svg …> tag: no fixed size, no namespaces (HTML needs none), a title for screen readers."""
    found = re.search(r'<svg\b[^>]*viewBox="([^"]+)"[^>]*>', text)
    if found is None:
        raise ValueError("matplotlib wrote no viewBox")
    head = f'<svg class="figure" viewBox="{found[1]}" role="img" aria-labelledby="{name}-title">'
    return head + f'<title id="{name}-title">{description}</title>' + text[found.end() :]
