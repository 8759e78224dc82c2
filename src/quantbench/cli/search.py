"""Commands that look for where the bits go: sensitivity ranks a run's layers, search chooses among its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantbench.cli.app import app
from quantbench.cli.show import print_json, print_rows
from quantbench.errors import RequestError

if TYPE_CHECKING:
    from quantbench.calibrate.budget import Selection
    from quantbench.mixture import Mixture

RunFolder = Annotated[Path, typer.Argument(help="The folder of a finished run.")]
Modes = Annotated[str | None, typer.Option("--modes", help="Variants of the run, comma separated.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of the run's calibration text to measure KL on.")]
Text = Annotated[str | None, typer.Option("--text", help="Another text to measure KL on.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all this process may use")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_FRONT_ROWS = 12


@app.command("sensitivity")
def sensitivity(
    run: RunFolder,
    modes: Modes = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Measure KL against the float model, one group quantized at a time.")
    ] = False,
    tokens: Tokens = 512,
    text: Text = None,
    top: Annotated[int, typer.Option("--top", min=0, help="Rows printed per variant; 0: all.")] = 20,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Ranks layers by the loss each costs alone: an estimate from the run's files, or measured (--measure)."""
    from quantbench.losses import Measurement, estimated_losses, measured_losses
    from quantbench.mixture import open_run, quantized_variants, saved_bytes
    from quantbench.reports.progress import open_progress

    opened = open_run(run)
    variants = quantized_variants(opened, listed(modes))
    with open_progress() as progress:
        if measured:
            losses = measured_losses(run, opened, variants, Measurement(tokens, text, threads), progress)
        else:
            losses = estimated_losses(run, opened, variants, progress)
    rows: list[dict[str, Any]] = [
        {"variant": name, "group": group, "loss": loss, "rank": rank, "bytes_saved": saved_bytes(opened, name, group)}
        for name, of in losses.items()
        for rank, (group, loss) in enumerate(sorted(of.items(), key=lambda item: -item[1]), start=1)
    ]
    kind = "kl" if measured else "estimate"
    if json:
        print_json({"loss": kind, "tokens": tokens if measured else None, "groups": rows})
        return
    typer.echo(
        f"KL against the float model in nats, {tokens} tokens"
        if measured
        else "an estimate: relative squared error of each group's output. --measure takes the KL of the whole model"
    )
    shown = [row for row in rows if not top or row["rank"] <= top]
    print_rows(["variant", "group", kind, "rank", "bytes saved"], [list(row.values()) for row in shown])


@app.command("search")
def search(
    run: RunFolder,
    budget_bytes: Annotated[
        int | None, typer.Option("--budget-bytes", min=1, help="Most bytes of the checkpoint's tensors.")
    ] = None,
    budget_ratio: Annotated[
        float | None, typer.Option("--budget-ratio", help="The same as a share of the float checkpoint, 0 to 1.")
    ] = None,
    modes: Modes = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Use the estimate instead of measuring.")] = False,
    tokens: Tokens = 512,
    text: Text = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the recipe is written.")] = Path("mixed.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Chooses a mode per layer under a byte budget, prints the Pareto front, and writes the choice as a recipe."""
    from quantbench.calibrate.budget import choose, front
    from quantbench.losses import Measurement, estimated_losses, measured_losses
    from quantbench.mixture import mixed_recipe, open_mixture, quantized_variants
    from quantbench.reports.progress import open_progress

    if output.exists() and not overwrite:
        raise RequestError(f"{output} exists already: --overwrite replaces it, --output names another file")
    mixture = open_mixture(run, listed(modes))
    budget = budget_of(mixture, budget_bytes, budget_ratio)
    variants = quantized_variants(mixture.run, list(mixture.variants))
    with open_progress() as progress:
        if estimate:
            losses = estimated_losses(run, mixture.run, variants, progress)
        else:
            losses = measured_losses(run, mixture.run, variants, Measurement(tokens, text, threads), progress)
    options = mixture.options(losses)
    chosen = choose(options, budget - mixture.fixed_bytes, mixture.fixed_bytes)
    points = [found(mixture, point) for point in front(options)]
    result = found(mixture, chosen)
    output.write_text(mixed_recipe(mixture, chosen, headline(result, budget, estimate)), encoding="utf-8")
    if json:
        print_json({"budget": budget, "chosen": result | {"groups": chosen.labels}, "front": points})
        return
    typer.echo("Pareto front (loss: the sum over groups); * marks the choice for the budget")
    print_rows(
        ["", "bytes", "ratio", "loss", "groups"], [row_of("", p) for p in thinned(points)] + [row_of("*", result)]
    )
    typer.echo(f"{output}: run it with `quantbench calibrate {output}`")


def listed(text: str | None) -> list[str]:
    """ "a, b" -> ["a", "b"]; nothing -> []."""
    return [word for part in (text or "").split(",") if (word := part.strip())]


def budget_of(mixture: Mixture, given: int | None, ratio: float | None) -> int:
    """Bytes of the whole checkpoint. Raises RequestError unless exactly one of the two is given."""
    if (given is None) == (ratio is None):
        raise RequestError("give the budget once: --budget-bytes N, or --budget-ratio R of the float checkpoint")
    if given is not None:
        return given
    if ratio is None or not 0 < ratio <= 1:
        raise RequestError(f"--budget-ratio {ratio}: a share of the float checkpoint above 0, at most 1")
    return int(ratio * mixture.whole_bytes)


def found(mixture: Mixture, point: Selection) -> dict[str, Any]:
    """A selection as bytes of the whole checkpoint, their share of the float one, loss, and groups per variant."""
    total = point.bytes + mixture.fixed_bytes
    counts = Counter(label for group, label in point.labels.items() if group != "lm_head")
    return {"bytes": total, "ratio": total / mixture.whole_bytes, "loss": point.loss, "counts": dict(counts)}


def headline(result: Mapping[str, Any], budget: int, estimate: bool) -> str:
    """The comment at the top of the written recipe."""
    unit = "summed estimate" if estimate else "summed KL"
    counts = ", ".join(f"{n} groups {name}" for name, n in result["counts"].items())
    return (
        f"Written by `quantbench search` for a budget of {budget:,} bytes.\n"
        f"{result['bytes']:,} bytes of tensors, {unit} {result['loss']:.4g}: {counts}."
    )


def row_of(mark: str, point: Mapping[str, Any]) -> list[Any]:
    counts = ", ".join(f"{n} {name}" for name, n in sorted(point["counts"].items()))
    return [mark, point["bytes"], point["ratio"], point["loss"], counts]


def thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About a dozen points of a front, the ends among them."""
    count = min(_FRONT_ROWS, len(points))
    return [points[round(i * (len(points) - 1) / max(count - 1, 1))] for i in range(count)]
