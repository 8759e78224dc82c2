"""Tells what came of a run. Reads the files of a run folder and nothing else: no model, no scale code, no engine.

`read_run` gathers the files, `build_report` turns them into one dictionary (report.json), and the terminal, the page
and the comparison of several runs are views of that dictionary. Matplotlib and Jinja are imported when a page is asked
for, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare", "print_comparison", "print_report", "write_comparison", "write_report"]


def write_report(folder: Path | str) -> dict[str, Any]:
    """Writes report.json and report.html into the run folder and returns the report; `passed`: did every gate hold.

    Raises CheckpointError naming every damaged file of the folder."""
    from quantbench.reports.gather import read_run
    from quantbench.reports.html import write_html
    from quantbench.reports.report import build_report, write_json

    run = read_run(folder)
    report = build_report(run)
    write_json(report, run.path / "report.json")
    write_html(report, run.path / "report.html")
    return report


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The report on `console` (default standard output), plain where that is no terminal."""
    from quantbench.reports.terminal import print_report as show

    show(report, console)


def compare(paths: Sequence[Path | str]) -> dict[str, Any]:
    """Several runs, or checkpoints inside runs, side by side. Raises CheckpointError naming every unreadable one."""
    from quantbench.reports.compare import compare_runs

    return compare_runs(paths)


def print_comparison(comparison: dict[str, Any], console: Console | None = None) -> None:
    """The comparison on `console` (default standard output)."""
    from quantbench.reports.compare import print_comparison as show

    show(comparison, console)


def write_comparison(comparison: dict[str, Any], path: Path | str) -> Path:
    """The comparison as one self-contained page at `path`."""
    from quantbench.reports.compare import write_html

    return write_html(comparison, Path(path))
