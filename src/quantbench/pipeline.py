"""The whole job, as one story. Every stage leaves files in the run folder, and a stage whose files are there is done.

load → plan → (collect → choose → apply → write, block by block) → validate → report
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantbench.calibrate.biases import require_biases
from quantbench.calibrate.blocks import finish_checkpoints, quantize_blocks
from quantbench.calibrate.data import TokenBatches, load_tokens
from quantbench.calibrate.job import BlockJob, checkpoint_path, streams
from quantbench.calibrate.rotated import require_rotatable
from quantbench.errors import RecipeError, unknown
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.models import LINEARS, block_prefix, linear_names, linear_shapes, model_tensors
from quantbench.process import give_freed_memory_back, one_thread_per_product, reuse_freed_memory
from quantbench.recipes.facts import ModelFacts
from quantbench.recipes.load import load_recipe
from quantbench.recipes.lock import Lock, load_lock, verify_lock, write_lock
from quantbench.recipes.plan import Plan, make_plan
from quantbench.recipes.plan_file import plan_json
from quantbench.recipes.schema import Recipe
from quantbench.recipes.seal import Seal
from quantbench.reports import write_report
from quantbench.reports.progress import Progress
from quantbench.validation import GATES_FILE, MEASUREMENTS, judge, validate

# What `--from STAGE` deletes before it resumes, stage by stage; a later stage's products go too.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "collect": ("statistics", "prefix"),
    "choose": ("work", "scales", "checkpoint"),
    "validate": (*MEASUREMENTS, GATES_FILE),
    "report": ("report.json", "report.html"),
}


@dataclass(frozen=True)
class Options:
    """How a recipe is run. `start`: redo from this stage; `device`: what Paddle computes on, None = its own default."""

    overrides: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False
    start: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Run:
    """A recipe that fits its model: everything known before a weight or a text is read."""

    recipe: Recipe
    source: ModelSource
    plan: Plan
    folder: Path


def calibrate(recipe: str, options: Options, progress: Progress) -> dict[str, Any]:
    """Run the whole recipe. Returns the report; its `passed` says whether every gate held.

    Raises QuantbenchError with all that is wrong; what finished blocks left on disk stays for --resume.
    """
    reuse_freed_memory()
    with progress:
        run = load(recipe, options)
        tokens = prepare(run, options)
        quantize(run, tokens, options, progress)
        validate(run.folder, run.recipe, run.source, run.plan, progress)
        judge(run.folder, run.recipe, run.source)
        return report(run, progress)


def load(recipe: str, options: Options) -> Run:
    """Read the recipe, open the model, and decide what happens to every layer. Reads no weights and writes nothing."""
    asked = load_recipe(recipe, options.overrides)
    source = open_model(asked.model)
    shapes = linear_shapes(source.config) | {"lm_head": (source.config.vocab_size, source.config.hidden_size)}
    layers = {name: shapes[name.split(".", 3)[-1]] for name in linear_names(source.config)}
    plan = make_plan(asked, layers, facts_of(source))
    require_rotatable(source.config, plan.variants.values())
    require_biases(source.config, plan.variants.values())
    return Run(asked, source, plan, Path(asked.output))


def facts_of(source: ModelSource) -> ModelFacts:
    """What the plan must know of a model, in numbers."""
    c = source.config
    linears = {f"{name}.weight" for name in linear_names(c)}
    others = (math.prod(shape) for name, shape in model_tensors(c).items() if name not in linears)
    return ModelFacts(
        name=source.name,
        family=c.family,
        dtype=c.dtype,
        num_layers=c.num_layers,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        float_elements=sum(others),
        tied_head=c.tie_word_embeddings,
        groups={
            f"{block_prefix(i)}.{line.name}": f"{block_prefix(i)}.{line.fused}"
            for i in range(c.num_layers)
            for line in LINEARS
        },
    )


def prepare(run: Run, options: Options) -> TokenBatches:
    """Make the run folder ready, read the calibration text, and lock what this run is made of.

    A folder that holds another run is refused: nobody loses hours to a forgotten `output:`.
    """
    lock = run.folder / "recipe.lock.yaml"
    if options.start is not None and options.start not in PRODUCTS:
        raise RecipeError(f"--from: {unknown('stage', options.start, PRODUCTS)}")
    tokens = load_tokens(run.recipe.calibration, run.source.tokenizer())
    now = Lock(run.recipe, Seal(run.source.sha256(), {run.recipe.calibration.data: tokens.sha256}, versions()))
    if options.overwrite and lock.exists():
        shutil.rmtree(run.folder)
    if lock.exists():
        if not (options.resume or options.start):
            raise RecipeError(
                f"{run.folder} holds a run already: --resume continues it, --from STAGE redoes a part, "
                "--overwrite replaces it, --set output=… writes elsewhere"
            )
        if differences := verify_lock(load_lock(lock), now):
            raise RecipeError(*(f"{lock}: {d}. Resume with what was, or use --overwrite" for d in differences))
        discard(run.folder, options.start)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_lock(run.recipe, lock, now.seal.model_sha256, now.seal.data_sha256, now.seal.versions)
    (run.folder / "plan.json").write_text(json.dumps(plan_json(run.plan), indent=1))
    return tokens


def versions() -> dict[str, str]:
    """What the bytes of a run depend on besides recipe, model and text. What is not installed is left out."""
    names = ("quantbench", "numpy", "paddlepaddle", "paddlepaddle-gpu", "paddleslim", "tokenizers")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def discard(folder: Path, start: str | None) -> None:
    """Delete what stage `start` and the stages behind it have left, and files that a kill left half-written."""
    for stale in folder.rglob(".*.tmp"):
        stale.unlink()
    order = list(PRODUCTS)
    for stage in order[order.index(start) :] if start else ["report"]:
        for name in PRODUCTS[stage]:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def quantize(run: Run, tokens: TokenBatches, options: Options, progress: Progress) -> None:
    """Collect, choose, apply and write, block by block; checkpoints appear whole or not at all."""
    if all(checkpoint_path(run.folder, name).exists() for name in run.plan.variants):
        return
    from quantbench.calibrate.paddle_forward import PaddleForward

    calibration = run.recipe.calibration
    job = BlockJob(
        folder=run.folder,
        source=run.source,
        forward=PaddleForward.of(run.source, device=options.device),
        tokens=tokens,
        variants=run.plan.variants,
        batch=calibration.batch,
        quantized_inputs=calibration.inputs == "quantized",
        spill_above=calibration.spill_above,
        reuse_statistics=options.start == "choose",
    )
    progress.stage("calibrate", run.source.config.num_layers * len(streams(job)))
    give_freed_memory_back()  # what the text took
    with one_thread_per_product():
        quantize_blocks(job, lambda _: progress.advance())
        give_freed_memory_back()  # what the blocks took, before the embedding is read
        progress.stage("write checkpoints", len(run.plan.variants))
        finish_checkpoints(job, lambda _: progress.advance())


def report(run: Run, progress: Progress) -> dict[str, Any]:
    """report.json and report.html from the files of the run folder; work/ has served its purpose."""
    progress.stage("report")
    shutil.rmtree(run.folder / "work", ignore_errors=True)
    return write_report(run.folder)
