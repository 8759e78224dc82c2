"""The loss of every group of a run's variants: estimated from its files, or measured once and kept in the run.

    sensitivity.json: {"tokens", "data", "tokens_sha256",
                       "variants": {variant: {"checkpoint_sha256", "kl": {group: nats}}}}

What was measured on other tokens or another checkpoint does not count and is measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantbench.calibrate.data import TokenBatches, load_tokens
from quantbench.calibrate.job import checkpoint_path
from quantbench.calibrate.rotated import Turn, model_of
from quantbench.calibrate.sensitivity import HEAD, estimate_block, quantized_groups
from quantbench.calibrate.trials import Trials, measure
from quantbench.errors import RequestError
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.pipeline import Run
from quantbench.reports.progress import Progress
from quantbench.scales import statistics as stats
from quantbench.scales.table import ScaleTable, write_atomically

FILE = "sensitivity.json"
CONTEXT = 512
Losses = dict[str, dict[str, float]]  # variant -> group -> loss


@dataclass(frozen=True)
class Measurement:
    """What a measurement runs on. `data` None: the run's calibration text; never the text that accuracy is told on."""

    tokens: int = CONTEXT
    data: str | None = None
    threads: int | None = None


def estimated_losses(folder: Path, run: Run, names: Iterable[str], progress: Progress) -> Losses:
    """The estimate of `calibrate.sensitivity` for every quantized group of the named variants. Unit: relative squared
    error of the group's output. The head has no saved statistics: its estimate is that of its weight alone."""
    wanted = list(names)
    progress.stage("estimate", len(wanted) * run.source.config.num_layers)
    found: Losses = {}
    for name in wanted:
        checkpoint, table = _opened(folder, name)
        model = model_of(run.source, run.plan.variants[name])
        losses: dict[str, float] = {}
        for layer in range(run.source.config.num_layers):
            seen = stats.load(_statistics(folder, name) / f"block_{layer:05d}.safetensors")
            losses |= estimate_block(layer, model, checkpoint, table, seen)
            progress.advance()
        if any(group.name == HEAD for group in quantized_groups(checkpoint)):
            losses[HEAD] = table[f"{HEAD}.weight"].loss or 0.0
        found[name] = losses
    return found


def measured_losses(folder: Path, run: Run, names: Iterable[str], asked: Measurement, progress: Progress) -> Losses:
    """KL in nats of every quantized group of the named variants, from sensitivity.json where it is there, else measured
    and kept there, variant by variant. Raises RequestError below two tokens, DataError for too short a text."""
    batches = _tokens(run, asked)
    document: dict[str, Any] = {
        "tokens": batches.tokens, "data": batches.source, "tokens_sha256": batches.sha256, "variants": {},
    }  # fmt: skip
    document["variants"] = _kept(folder / FILE, document)
    windows = [ids[:length].tolist() for ids, length in zip(batches.ids, batches.lengths, strict=True)]
    held: tuple[Turn | None, Trials] | None = None  # one float model in memory at a time
    found: Losses = {}
    for name in names:
        checkpoint, table = _opened(folder, name)
        kept = document["variants"].get(name, {})
        if kept.get("checkpoint_sha256") != checkpoint.sha256():
            progress.stage(f"measure {name}", len(quantized_groups(checkpoint)))
            variant = run.plan.variants[name]
            model, turn = model_of(run.source, variant), Turn.of(variant)
            if held is None or held[0] != turn:
                held = None
                held = turn, Trials(model, windows, asked.threads)
            losses = measure(held[1], model, checkpoint, table, lambda _: progress.advance())
            kept = {"checkpoint_sha256": checkpoint.sha256(), "kl": losses}
            document["variants"][name] = kept
            write_atomically(folder / FILE, json.dumps(document, indent=1).encode())
        found[name] = kept["kl"]
    return found


def _tokens(run: Run, asked: Measurement) -> TokenBatches:
    if asked.tokens < 2:
        raise RequestError(f"--tokens {asked.tokens}: at least 2 tokens are needed")
    length = min(CONTEXT, asked.tokens)
    calibration = run.recipe.calibration
    data = asked.data or calibration.data
    changes = {"samples": -(-asked.tokens // length), "length": length, "data": data}
    return load_tokens(calibration.model_copy(update=changes), run.source.tokenizer())


def _kept(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call measured on the same tokens; nothing where the file is absent or of other tokens."""
    if not path.is_file():
        return {}
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(earlier["variants"]) if earlier.get("tokens_sha256") == document["tokens_sha256"] else {}


def _opened(folder: Path, name: str) -> tuple[ModelSource, ScaleTable]:
    """A variant's checkpoint and scale table. Raises ModelError or CheckpointError where they cannot be read."""
    return open_model(checkpoint_path(folder, name)), ScaleTable.load(folder / "scales" / name)


def _statistics(folder: Path, name: str) -> Path:
    """Where a variant's statistics lie: its own, if it saw its own inputs."""
    own = folder / "statistics" / name
    return own if own.is_dir() else folder / "statistics"
