"""report.html: one file that needs nothing else, neither network nor fonts nor scripts of others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from quantbench.reports import advice, formatting
from quantbench.reports.charts import CHARTS, charts
from quantbench.reports.figures import series_of
from quantbench.reports.report import write_text
from quantbench.reports.stages import name_of
from quantbench.reports.terminal import first_batch, variant_style

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: dict[str, Any]) -> str:
    """The page of `report` (see `build_report`). The same report gives the same bytes."""
    return page("report.html.j2", report, CHARTS)


def page(template: str, report: dict[str, Any], shown: Iterable[str]) -> str:
    """`template` with the tables of `report` and those figures in `shown` that it has numbers for."""
    figures = charts(report, shown)
    return (
        environment()
        .get_template(template)
        .render(
            report=report,
            figures=figures,
            key_figures=[name for name in KEY_FIGURES if name in figures][:2],
            batch=first_batch(report),
            series=series_of(report),
            levels={name: _level(report, name) for name in report["variants"]},
            groups=_groups(report["findings"]),
            quantized=[name for name, record in report["variants"].items() if record["worst"]],
            limits=advice,
        )
    )


KEY_FIGURES = ("accuracy_speed", "activation_ranges", "sqnr")  # the first two there are go on the first screen


def write_html(report: dict[str, Any], path: Path) -> Path:
    """Writes the page to `path`, in one step."""
    return write_text(path, render_html(report))


def environment() -> jinja2.Environment:
    """Templates of this package, everything escaped but the figures, a misspelt name an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("plain", "percent", "interval", "size", "times", "decibel"):
        made.filters[name] = getattr(formatting, name)
    made.filters["stage"] = name_of
    return made


def _level(report: dict[str, Any], name: str) -> str:
    """A row's look: bad, best or nothing."""
    return {"red": "bad", "bold green": "best"}.get(variant_style(report, name), "")


def _groups(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Findings of one variant and rule together, since what to try is the same for all of them."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in findings:
        key = finding["variant"], finding["rule"]
        group = groups.setdefault(key, {"variant": key[0], "rule": key[1], "severity": "warn", "findings": []})
        group["findings"].append(finding)
        if finding["severity"] == "bad":
            group["severity"] = "bad"
    return list(groups.values())
