"""Commands that look for where the bits go: sensitivity ranks a run's layers, search chooses among its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantbench.cli.app import app
from quantbench.cli.show import print_json, print_rows
from quantbench.errors import RequestError

if TYPE_CHECKING:
    from quantbench.calibrate.budget import Selection
    from quantbench.mixture import Losses, Mixture
    from quantbench.pace import Speed
    from quantbench.reports.progress import Progress

RunFolder = Annotated[Path, typer.Argument(help="The folder of a finished run.")]
Modes = Annotated[str | None, typer.Option("--modes", help="Variants of the run, comma separated.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of the run's calibration text to measure KL on.")]
Text = Annotated[str | None, typer.Option("--text", help="Another text to measure KL on.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all this process may use")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_FRONT_ROWS = 12
Found = dict[str, Any]  # a selection in numbers


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
    budget_speed: Annotated[
        float | None, typer.Option("--budget-tokens-per-s", help="Least decode speed, measured on this machine.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="With a speed: sequences decoded at once.")] = 1,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="With a speed: tokens in front of each.")] = 128,
    modes: Modes = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Use the estimate instead of measuring.")] = False,
    tokens: Tokens = 512,
    text: Text = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the recipe is written.")] = Path("mixed.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Chooses a mode per layer under a budget of bytes or of decode time, prints the Pareto front, writes a recipe."""
    from quantbench.losses import Measurement, estimated_losses, measured_losses
    from quantbench.mixture import mixed_recipe, open_mixture, quantized_variants
    from quantbench.pace import Speed
    from quantbench.reports.progress import open_progress

    if output.exists() and not overwrite:
        raise RequestError(f"{output} exists already: --overwrite replaces it, --output names another file")
    require_one(budget_bytes, budget_ratio, budget_speed)
    mixture = open_mixture(run, listed(modes), inputs=budget_speed is not None)
    speed = None if budget_speed is None else Speed(budget_speed, batch, prompt, threads)
    variants = quantized_variants(mixture.run, list(mixture.variants))
    with open_progress() as progress:
        if estimate:
            losses = estimated_losses(run, mixture.run, variants, progress)
        else:
            losses = measured_losses(run, mixture.run, variants, Measurement(tokens, text, threads), progress)
        if speed is None:
            budget = budget_of(mixture, budget_bytes, budget_ratio)
            chosen, result, points = within_bytes(mixture, losses, budget)
            asked = f"{budget:,} bytes"
        else:
            chosen, result, points = within_time(run, mixture, losses, speed, progress)
            asked = f"{speed.tokens_per_s:g} tokens/s at batch {speed.batch}"
    output.write_text(mixed_recipe(mixture, chosen, headline(result, asked, estimate)), encoding="utf-8")
    if json:
        spent = {"budget": budget} if speed is None else {"budget_tokens_per_s": speed.tokens_per_s}
        print_json(spent | {"chosen": result | {"groups": chosen.labels}, "front": points})
        return
    typer.echo("Pareto front (loss: the sum over groups); * marks the choice for the budget")
    columns = [k for k in ("tokens_per_s", "bytes", "ratio", "loss") if k in result]
    rows = [row_of("", columns, p) for p in thinned(points)] + [row_of("*", columns, result)]
    print_rows(["", *columns, "groups"], rows)
    if "measured_tokens_per_s" in result:
        least, most = result["measured_least"], result["measured_most"]
        told = f"{result['measured_tokens_per_s']:.4g} ({least:.4g} to {most:.4g}) tokens/s"
        typer.echo(f"measured together: {told} at batch {batch}")
    typer.echo(f"{output}: run it with `quantbench calibrate {output}`")


def within_bytes(mixture: Mixture, losses: Losses, budget: int) -> tuple[Selection, Found, list[Found]]:
    """The choice for a budget of bytes of the whole checkpoint, that choice in numbers, and the front."""
    from quantbench.calibrate.budget import choose, front

    def refusal(least: int) -> str:
        smallest = least + mixture.fixed_bytes
        return (
            f"the budget of {budget:,} bytes cannot be met: the smallest choice takes {smallest:,}. "
            f"Raise the budget by {smallest - budget:,} bytes, or allow a smaller mode"
        )

    options = mixture.options(losses)
    chosen = choose(options, budget - mixture.fixed_bytes, refusal)
    return chosen, found(mixture, chosen), [found(mixture, point) for point in front(options)]


def within_time(
    run: Path, mixture: Mixture, losses: Losses, speed: Speed, progress: Progress
) -> tuple[Selection, Found, list[Found]]:
    """The same for a decode speed: every candidate's groups are timed, and at the end the choice itself."""
    from quantbench.calibrate.budget import choose, front
    from quantbench.pace import open_pace, timed

    budget = speed.budget_ns
    pace = open_pace(run, mixture, speed)
    costs = timed(pace, mixture, speed, progress)

    def told(point: Selection) -> Found:
        return {"tokens_per_s": costs.tokens_per_s(point)} | found(mixture, point)

    options = costs.options(losses)
    chosen = choose(options, budget - costs.fixed_ns, costs.refusal)
    step = pace.step_of(chosen.labels, costs.times.base_s)
    measured = {
        "measured_tokens_per_s": speed.batch / step.median,
        "measured_least": speed.batch / step.most,
        "measured_most": speed.batch / step.least,
    }
    return chosen, told(chosen) | measured, [told(point) for point in front(options)]


def listed(text: str | None) -> list[str]:
    """ "a, b" -> ["a", "b"]; nothing -> []."""
    return [word for part in (text or "").split(",") if (word := part.strip())]


def require_one(*budgets: float | None) -> None:
    """Raises RequestError unless exactly one budget is given."""
    if sum(b is not None for b in budgets) != 1:
        raise RequestError(
            "give the budget once: --budget-bytes N, --budget-ratio R of the float checkpoint, "
            "or --budget-tokens-per-s S"
        )


def budget_of(mixture: Mixture, given: int | None, ratio: float | None) -> int:
    """Bytes of the whole checkpoint. Raises RequestError for a ratio that is none."""
    if given is not None:
        return given
    if ratio is None or not 0 < ratio <= 1:
        raise RequestError(f"--budget-ratio {ratio}: a share of the float checkpoint above 0, at most 1")
    return int(ratio * mixture.whole_bytes)


def found(mixture: Mixture, point: Selection) -> Found:
    """A selection as bytes of the whole checkpoint, their share of the float one, loss, and groups per variant."""
    total = mixture.bytes_with(point)
    counts = Counter(label for group, label in point.labels.items() if group != "lm_head")
    return {"bytes": total, "ratio": total / mixture.whole_bytes, "loss": point.loss, "counts": dict(counts)}


def headline(result: Found, asked: str, estimate: bool) -> str:
    """The comment at the top of the written recipe."""
    unit = "summed estimate" if estimate else "summed KL"
    counts = ", ".join(f"{n} groups {name}" for name, n in result["counts"].items())
    speed = f"{result['measured_tokens_per_s']:.4g} tokens/s measured, " if "measured_tokens_per_s" in result else ""
    return (
        f"Written by `quantbench search` for a budget of {asked}.\n"
        f"{speed}{result['bytes']:,} bytes of tensors, {unit} {result['loss']:.4g}: {counts}."
    )


def row_of(mark: str, columns: Sequence[str], point: Found) -> list[Any]:
    counts = ", ".join(f"{n} {name}" for name, n in sorted(point["counts"].items()))
    return [mark, *(point[column] for column in columns), counts]


def thinned(points: list[Found]) -> list[Found]:
    """About a dozen points of a front, the ends among them."""
    count = min(_FRONT_ROWS, len(points))
    return [points[round(i * (len(points) - 1) / max(count - 1, 1))] for i in range(count)]
