"""How commands print: rows as a table (tab-free plain text where stdout is no terminal), objects as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import typer


def print_json(value: Any) -> None:
    """One JSON object and nothing else on stdout; dataclasses become objects."""
    typer.echo(
        json.dumps(value, indent=1, default=lambda x: asdict(x) if hasattr(x, "__dataclass_fields__") else str(x))
    )


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns; numbers to the right."""
    text = [[_cell(value) for value in row] for row in rows]
    numeric = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(columns))]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *text, strict=True)]
    for line in [list(columns), *text]:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
