"""The command line. Each command is a few lines: read options, call the function that does it, print the result.

Exit codes: 0 done, 1 a gate failed or a lint found errors, 2 wrong input (one clear line per problem), 130 interrupted.
Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer

import quantbench.cli.doctor
import quantbench.cli.files
import quantbench.cli.models
import quantbench.cli.run
import quantbench.cli.search  # noqa: F401  (each of these registers its commands)
from quantbench.cli.app import app
from quantbench.errors import QuantbenchError


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
