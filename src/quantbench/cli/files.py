"""Commands that look at files: fetch, inspect, lint, diff, compare. PATH is a checkpoint, a model or a scale table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantbench.cli.app import app
from quantbench.cli.show import print_json, print_rows

PathArgument = Annotated[Path, typer.Argument(help="A checkpoint, a model directory, a GGUF file or a scale table.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def is_table(path: Path) -> bool:
    """Whether `path` is the folder of a scale table."""
    return (path / "scales.json").is_file()


@app.command("fetch")
def fetch(names: Annotated[list[str], typer.Argument(help="demo:smollm2, demo:wikipedia, or a hub name.")]) -> None:
    """Download a demo model, the demo text or a hub model. The only command that uses the network."""
    from quantbench.infer.checkpoint.source import fetch_model

    for name in names:
        typer.echo(f"{name}: {fetch_model(name)}")


@app.command("inspect")
def inspect(path: PathArgument, json: Json = False) -> None:
    """What is stored: format, scales and bytes of every layer, or every entry of a scale table with its reason."""
    columns, rows = table_rows(path) if is_table(path) else checkpoint_rows(path)
    if json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_rows(columns, rows)


def table_rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    from quantbench.scales.table import ScaleTable

    rows = [
        [e.name, e.format, e.granularity, e.observer, *bounds(e.scale), e.loss, e.reason] for e in ScaleTable.load(path)
    ]
    return ["entry", "format", "granularity", "observer", "scale min", "scale max", "loss", "reason"], rows


def bounds(scale: Any) -> tuple[float | None, float | None]:
    return (float(scale.min()), float(scale.max())) if scale.size else (None, None)


def checkpoint_rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    from quantbench.infer.checkpoint.inspect import describe

    rows = [[r.name, r.stored, r.inputs, str(list(r.shape)), r.bytes, r.scale_min, r.scale_max] for r in describe(path)]
    return ["name", "stored", "inputs", "shape", "bytes", "scale min", "scale max"], rows


@app.command("lint")
def lint(path: PathArgument, json: Json = False) -> None:
    """Look for damage: NaN, Inf, zero and absent scales, flipped bytes, untied layers, dead channels, saturation."""
    from quantbench.infer.checkpoint.lint import lint_checkpoint

    found: list[Any] = lint_scales(path) if is_table(path) else lint_checkpoint(path)
    if json:
        print_json(found)
    else:
        for finding in found:
            typer.echo(str(finding))
        typer.echo(f"{len(found)} findings" if found else "nothing found")
    if any(f.severity == "error" for f in found):
        raise typer.Exit(1)


def lint_scales(path: Path) -> list[Any]:
    """Findings of a scale table; inside a run folder, also what its plan needs and its statistics contradict."""
    from quantbench.calibrate.blocks import seen_by
    from quantbench.recipes.plan_file import load_plan
    from quantbench.scales.lint import lint_table
    from quantbench.scales.table import ScaleTable

    table, run = ScaleTable.load(path), path.resolve().parents[1]
    if not (run / "plan.json").is_file():
        return list(lint_table(table))
    variant = load_plan(run / "plan.json").variants[path.resolve().name]
    return list(lint_table(table, variant, seen_by(run, variant.name, table)))


@app.command("diff")
def diff(a: PathArgument, b: PathArgument, json: Json = False) -> None:
    """What differs between two scale tables or two checkpoints. Exit code 1 if anything does."""
    from quantbench.infer.checkpoint.diff import diff_checkpoints
    from quantbench.scales.diff import diff_tables
    from quantbench.scales.table import ScaleTable

    tables = is_table(a) and is_table(b)
    found = diff_tables(ScaleTable.load(a), ScaleTable.load(b)) if tables else diff_checkpoints(a, b)
    if json:
        print_json(found)
    elif found:
        print_rows(["name", "what", "a", "b"], [[d.name, d.field, d.before, d.after] for d in found])
    else:
        typer.echo("no difference")
    if found:
        raise typer.Exit(1)


@app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or checkpoints inside them.")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write the comparison as one page.")] = None,
    json: Json = False,
) -> None:
    """Several runs side by side, and what makes their numbers not comparable."""
    from quantbench import reports

    found = reports.compare(runs)
    if html:
        reports.write_comparison(found, html)
    if json:
        print_json(found)
    else:
        reports.print_comparison(found)
