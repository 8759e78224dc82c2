"""Several runs side by side, in the columns of one report, and where their numbers must not be compared.

The comparison is itself shaped like a report (`variants` holds "<run>/<variant>" of every run), so the same tables and
figures show it. Two numbers stand in one ranking only if they were measured on the same text or the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from quantbench.errors import CheckpointError
from quantbench.reports.gather import read_run
from quantbench.reports.html import page
from quantbench.reports.report import build_report, write_text
from quantbench.reports.terminal import SUMMARY, first_batch, print_table, say, summary_row, variant_style

FIGURES = ("accuracy_speed", "sqnr", "throughput", "memory")
_SPEED, _ACCURACY = ("accuracy_speed", "throughput"), ("accuracy_speed",)
CEILING_DRIFT = 0.15  # the same machine was this much faster or slower: its speeds are no longer the same yardstick


def compare_runs(paths: Sequence[Path | str]) -> dict[str, Any]:
    """A report of all `paths`, each a run folder or a `checkpoint/<variant>` folder in one, with two keys more:

    `runs` [{"name", "path", "model", "baseline"}] and `differences` [{"of", "text", "hides"}]: what was not the same in
    all runs, and the figures that therefore are not drawn. Raises CheckpointError naming everything unreadable."""
    chosen = _chosen([Path(path) for path in paths])
    labels = _labels(list(chosen))
    reports: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for root, variants in chosen.items():
        try:
            reports[labels[root]] = _only(build_report(read_run(root)), root, variants)
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return _joined(reports)


def _chosen(paths: list[Path]) -> dict[Path, list[str] | None]:
    """Run folder -> the variants asked for, None for all."""
    if not paths:
        raise CheckpointError("nothing to compare; give run folders, or checkpoint folders inside run folders")
    chosen: dict[Path, list[str] | None] = {}
    for path in paths:
        inside = path.parent.name == "checkpoint"
        root = path.parent.parent if inside else path
        wanted = chosen.setdefault(root, [] if inside else None)
        if inside and wanted is not None:
            wanted.append(path.name)
        elif not inside:
            chosen[root] = None
    return chosen


def _labels(roots: list[Path]) -> dict[Path, str]:
    """The folder's own name where that tells the runs apart, else its path."""
    names = [root.resolve().name for root in roots]
    unique = len(set(names)) == len(names)
    return {root: name if unique else root.as_posix() for root, name in zip(roots, names, strict=True)}


def _only(report: dict[str, Any], root: Path, variants: list[str] | None) -> dict[str, Any]:
    """`report` with the baseline and `variants`."""
    if variants is None:
        return report
    absent = [name for name in variants if name not in report["variants"]]
    if absent:
        known = ", ".join(report["variants"])
        raise CheckpointError(*(f"{root}: has no variant {name!r}; it has {known}" for name in absent))
    kept = {name: r for name, r in report["variants"].items() if name in variants or r["baseline"]}
    return report | {
        "variants": kept,
        "findings": [f for f in report["findings"] if f["variant"] in kept],
        "gates": [g for g in report["gates"] if g["variant"] in kept],
    }


def _joined(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(reports.values()))
    models = list(dict.fromkeys(str(r["run"]["model"]) for r in reports.values()))
    baselines = {r["run"]["baseline"] for r in reports.values()}
    baseline = first["run"]["baseline"] if len(baselines) == 1 else None
    return {
        "schema": first["schema"],
        "passed": all(report["passed"] for report in reports.values()),
        "run": {"name": ", ".join(reports), "path": "", "model": ", ".join(models), "baseline": baseline},
        "runs": [report["run"] | {"name": name} for name, report in reports.items()],
        "differences": _differences(reports),
        "conditions": first["conditions"],
        "verdict": {"status": "no_gates", "gates": {"total": 0, "failed": 0}, "best": None, "sentences": []},
        "gates": [],
        "variants": {
            f"{run}/{name}": record for run, report in reports.items() for name, record in report["variants"].items()
        },
        "findings": [
            finding | {"variant": f"{run}/{finding['variant']}"}
            for run, report in reports.items()
            for finding in report["findings"]
        ],
        "ranges": {"float": {}, "after": {}},
        "cache_ranges": {},
        "missing": [],
    }


def _differences(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was not the same in all runs; what a run did not measure is no difference."""
    checks = (
        ("model", "sizes, accuracy and speed are of different models", _model, _SPEED),
        ("perplexity text", "perplexities and their increases are not comparable", _scored("perplexity"), _ACCURACY),
        ("divergence text", "KL and top-1 are not comparable", _scored("divergence"), ()),
        ("questions", "choice accuracies are not comparable", _scored("choices"), ()),
        ("baseline", "increases and speedups are against different baselines", _baseline, _ACCURACY),
        ("machine", "speeds are not comparable", _machine, _SPEED),
        ("load", "speeds are not comparable", _load, _SPEED),
        ("state of the machine", "speeds were measured against different ceilings", _ceiling, _SPEED),
    )
    found = []
    for of, consequence, read, hides in checks:
        seen = {name: value for name, report in reports.items() if (value := read(report)) is not None}
        if len(seen) > 1 and not _same(list(seen.values())):
            told = "; ".join(f"{name}: {_words(value)}" for name, value in seen.items())
            found.append({"of": of, "text": f"{consequence}, the {of} differs ({told})", "hides": list(hides)})
    return found


def _same(values: list[Any]) -> bool:
    if all(isinstance(value, float) for value in values):
        return bool(max(values) <= min(values) * (1 + CEILING_DRIFT))
    return all(value == values[0] for value in values)


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g} GB/s"
    if isinstance(value, list):
        return " and ".join(_words(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _model(report: dict[str, Any]) -> Any:
    return report["run"]["model"]


def _baseline(report: dict[str, Any]) -> Any:
    return report["run"]["baseline"]


def _scored(kind: str) -> Any:
    return lambda report: report["conditions"][kind] or None


def _machine(report: dict[str, Any]) -> Any:
    machine = report["conditions"]["machine"]
    return machine and {key: machine.get(key) for key in ("cpu", "threads", "isa")}


def _load(report: dict[str, Any]) -> Any:
    load = report["conditions"]["throughput"]
    return load and {key: load[key] for key in ("prompt", "output")}


def _ceiling(report: dict[str, Any]) -> Any:
    value = report["conditions"]["ceilings"].get("read_gb_per_s")
    return None if value is None else float(value)


def print_comparison(comparison: dict[str, Any], console: Console | None = None) -> None:
    """What must not be compared, then one line per run and variant."""
    console = Console() if console is None else console
    for difference in comparison["differences"]:
        say(console, "warn", difference["text"])
    batch = first_batch(comparison)
    rows = [summary_row(name, record, batch) for name, record in comparison["variants"].items()]
    styled = [[Text(cell, style=variant_style(comparison, row[0])) for cell in row] for row in rows]
    print_table(console, f"{len(comparison['runs'])} runs; tokens/s, decode at batch {batch}", SUMMARY, styled)


def write_html(comparison: dict[str, Any], path: Path) -> Path:
    """The comparison as one self-contained page at `path`."""
    hidden = {name for difference in comparison["differences"] for name in difference["hides"]}
    shown = [name for name in FIGURES if name not in hidden]
    return write_text(path, page("compare.html.j2", comparison, shown))
