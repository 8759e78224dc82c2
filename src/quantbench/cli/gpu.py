"""`quantbench bench --config NAME --random-weights --device cuda`: speed of a GPU without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from quantbench.cli.show import print_json, print_rows
from quantbench.errors import RequestError


@dataclass(frozen=True)
class Asked:
    """The options of the command that matter here, as they were given."""

    config: str | None
    random_weights: bool
    model: str | None
    device: str
    modes: list[str]
    batches: str
    profile: bool
    dtype: str

    def name(self) -> str:
        """The config's name. Raises RequestError for options that do not go together, all at once."""
        problems = []
        if self.config is None or not self.random_weights:
            problems.append("--config and --random-weights go together: --config llama-3-8b --random-weights")
        if self.model is not None:
            problems.append(f"{self.model}: random weights need no model; leave it out")
        if self.device != "cuda":
            problems.append(f"--device {self.device}: random weights are made on a GPU; give --device cuda")
        if problems or self.config is None:
            raise RequestError(*problems)
        return self.config


def bench_random(asked: Asked, json: bool) -> None:
    """Measures a config on random weights and prints what was found. Raises RequestError for bad options,
    ModelError for an unknown config, RecipeError for an unknown mode, DependencyError without a GPU."""
    from quantbench.cli.models import batch_sizes
    from quantbench.infer.cuda.bench import CudaLoad, bench_modes
    from quantbench.infer.cuda.random import config_of
    from quantbench.reports.progress import open_progress
    from quantbench.vocabulary import parse_mode

    load = CudaLoad(asked.name(), batches=batch_sizes(asked.batches), dtype=asked.dtype, profile=asked.profile)
    config_of(load.config)
    for mode in asked.modes:
        parse_mode(mode)
    with open_progress() as progress:
        progress.stage("bench", len(asked.modes) * (1 + len(load.batches)) + 1)
        found = bench_modes(asked.modes, load, lambda _: progress.advance())
    if json:
        print_json(found)
        return
    machine = found["machine"]
    typer.echo(f"{machine['gpu']}, driver {machine['driver']}, {machine['arch']}, {asked.dtype} between operations")
    typer.echo("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in found["ceilings"].items()))
    columns = ["mode", "stage", "step ms", "graph ms", "tokens/s", "TB/s", "TFLOP/s", "share of ceiling"]
    print_rows(columns, [row for mode, measured in found["modes"].items() for row in speeds(mode, measured)])
    for mode, measured in found["modes"].items():
        print_profiles(mode, measured)


def speeds(mode: str, found: dict[str, Any]) -> Iterator[list[Any]]:
    """A line for prefill, then one for each batch."""
    first = found["prefill"]
    yield [mode, "prefill", None, None, first["tokens_per_s"], None, first["tflop_per_s"], first["share_of_ceiling"]]
    for batch, row in found["decode"].items():
        figures = [row[name] for name in ("step_ms", "graph_ms", "tokens_per_s", "tb_per_s", "tflop_per_s")]
        yield [mode, f"decode@{batch}", *figures, row["share_of_ceiling"]]


def print_profiles(mode: str, found: dict[str, Any]) -> None:
    stages = {"prefill": found["prefill"]} | {f"decode@{batch}": row for batch, row in found["decode"].items()}
    for stage, row in stages.items():
        if "profile_us" in row:
            typer.echo(f"{mode} {stage}: microseconds of one step by kernel, each alone")
            print_rows(["kernel", "us"], [[name, us] for name, us in row["profile_us"].items()])
