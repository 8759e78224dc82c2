"""Commands that take a recipe: calibrate, plan, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantbench.cli.app import app

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled recipe.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe word: --set calibration.samples=16")]


@app.command("calibrate")
def calibrate(
    recipe: Recipe,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the run folder holds.")] = False,
    start: Annotated[str | None, typer.Option("--from", help="Redo from: collect, choose, validate, report")] = None,
    overrides: Set = None,
    device: Annotated[str | None, typer.Option("--device", help="What Paddle runs on: cpu, gpu:0")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only, then stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """The whole job: calibrate, export, serve the exported bytes, report. Exit code 1 if a gate fails."""
    if dry_run:
        plan(recipe, overrides, json)
        return
    from json import dumps

    from quantbench.pipeline import Options, calibrate
    from quantbench.reports import print_report
    from quantbench.reports.progress import open_progress

    options = Options(tuple(overrides or ()), resume, overwrite, start, device)
    report = calibrate(recipe, options, open_progress())
    if json:
        typer.echo(dumps(report, indent=1))
    else:
        print_report(report)
    if not report["passed"]:
        raise typer.Exit(1)


@app.command("plan")
def plan(recipe: Recipe, overrides: Set = None, json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """The dry run: what happens to every layer and why, and what it will take. Reads no weights, writes nothing."""
    from json import dumps

    from quantbench.pipeline import Options, load
    from quantbench.recipes.plan_file import plan_json, print_plan

    run = load(recipe, Options(tuple(overrides or ())))
    if json:
        typer.echo(dumps(plan_json(run.plan), indent=1))
    else:
        print_plan(run.plan)


recipes = typer.Typer(help="The bundled recipes.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def list_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes.command("list")
def list_recipes() -> None:
    """Name and first line of every bundled recipe, and what it was measured to reach."""
    from quantbench.recipes.bundled import list_presets

    for preset in list_presets():
        typer.echo(f"{preset.name:<24} {preset.summary}")
        for reached in preset.reached:
            typer.echo(f"{'':<24}   {reached}")


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A name from the list.")]) -> None:
    """Print a bundled recipe, to copy and change."""
    from quantbench.recipes.bundled import preset_path

    typer.echo(Path(preset_path(name)).read_text(encoding="utf-8"), nl=False)
