"""Commands that look at files: fetch, inspect, lint, diff, compare."""

from __future__ import annotations

from typing import Annotated

import typer

from quantbench.cli import app

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("fetch")
def fetch(names: Annotated[list[str], typer.Argument(help="demo:smollm2, demo:wikipedia, or a hub name.")]) -> None:
    """Download a demo model, the demo text or a hub model. The only command that uses the network."""
    from quantbench.infer.checkpoint.source import fetch_model

    for name in names:
        typer.echo(f"{name}: {fetch_model(name)}")
