"""The application that every command registers on, and its global options."""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(
    name="quantbench",
    help="Calibrate and quantize LLMs, serve the exported bytes at once, and report what it cost and what it gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from quantbench import __version__

        typer.echo(__version__)
        raise typer.Exit
    if debug:
        os.environ["QUANTBENCH_DEBUG"] = "1"
