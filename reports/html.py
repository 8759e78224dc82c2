"""report.html: one file that needs nothing else, neither network nor fonts nor scripts of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from quantbench.reports import advice, formatting
from quantbench.reports.charts import charts
from quantbench.reports.figures import series_of
from quantbench.reports.report import write_text
from quantbench.reports.terminal import first_batch, variant_style

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: dict[str, Any]) -> str:
    """The page of `report` (see `build_report`). The same report gives the same bytes."""
    figures = charts(report)
    quantized = [name for name, record in report["variants"].items() if record["worst"]]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            figures=figures,
            key_figures=[name for name in ("accuracy_speed", "activation_ranges", "sqnr") if name in figures][:2],
            batch=first_batch(report),
            series=series_of(report),
            levels={name: _level(report, name) for name in report["variants"]},
            groups=_groups(report["findings"]),
            quantized=quantized,
            limits=advice,
        )
    )


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
