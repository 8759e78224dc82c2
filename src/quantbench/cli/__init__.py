"""The command line. Each command is a few lines: read options, call the function that does it, print the result.

Exit codes: 0 done, 1 a gate failed or a lint found errors, 2 wrong input (one clear line per problem), 130 interrupted.
Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from quantbench.errors import QuantbenchError

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


from quantbench.cli import doctor, files, models, run  # noqa: E402, F401  (they register their commands on `app`)


def main() -> None:
    """Entry point: expected errors become one clear line each and an exit code, never a traceback."""
    try:
        app(standalone_mode=True)
    except QuantbenchError as error:
        if os.environ.get("QUANTBENCH_DEBUG"):
            raise
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; a calibration continues where it was with --resume", err=True)
        sys.exit(130)
