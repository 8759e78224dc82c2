"""The validate stage: the exported bytes are loaded by the runtime and measured beside the float model.

Each measurement writes its own file, so a resumed run does not repeat what is done.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantbench.calibrate.data import eval_windows
from quantbench.calibrate.job import checkpoint_path
from quantbench.calibrate.prefix import kept_prefix
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.engine import Engine, Trace
from quantbench.infer.models import model_tensors
from quantbench.infer.validate.accuracy import AccuracyTasks, TokenSet, evaluate_accuracy
from quantbench.infer.validate.choices import ChoiceSet, load_choices
from quantbench.infer.validate.gates import GateResult, evaluate_gates
from quantbench.infer.validate.machine import describe_machine
from quantbench.infer.validate.parity import Parity
from quantbench.infer.validate.throughput import measure_throughput
from quantbench.infer.validate.timing import Load
from quantbench.infer.validate.visit import EngineSpec
from quantbench.recipes.plan import Plan
from quantbench.recipes.schema import Recipe
from quantbench.recipes.sections import Divergence, Perplexity
from quantbench.reports.progress import Progress

ACCURACY_FILE, THROUGHPUT_FILE, PARITY_FILE, GATES_FILE = (
    "accuracy.json",
    "throughput.json",
    "parity.json",
    "gates.json",
)
MEASUREMENTS = (ACCURACY_FILE, THROUGHPUT_FILE, PARITY_FILE)  # in the order `evaluate_gates` takes them
PARITY_CONTEXT = 257  # two traces of a window are held, with every tap of every layer: about 2 MB a token at 135M
Engines = dict[str, EngineSpec]


def validate(folder: Path, recipe: Recipe, source: ModelSource, plan: Plan, progress: Progress) -> None:
    """Measure accuracy, parity and speed of every checkpoint of the run, each unless its file is there already."""
    engines = engine_specs(folder, recipe, plan)
    once(folder / ACCURACY_FILE, lambda: measure_accuracy(folder, recipe, source.tokenizer(), engines, progress))
    if recipe.parity is not None:
        once(folder / PARITY_FILE, lambda: measure_parity(folder, recipe, source, plan, progress))
    if recipe.throughput is not None:
        once(folder / THROUGHPUT_FILE, lambda: measure_speed(folder, recipe, engines, progress))


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Write what `measure` returns, atomically, unless `path` exists."""
    if not path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(measure(), indent=1))
        temporary.replace(path)


def engine_specs(folder: Path, recipe: Recipe, plan: Plan) -> Engines:
    """Baseline first: the model in the baseline's float mode; then every exported checkpoint."""
    baseline = recipe.accuracy.baseline
    specs = {baseline: EngineSpec(recipe.model, baseline)}
    return specs | {n: EngineSpec(str(checkpoint_path(folder, n))) for n in plan.variants if n != baseline}


def measure_accuracy(
    folder: Path, recipe: Recipe, tokenizer: Tokenizer, engines: Engines, progress: Progress
) -> dict[str, Any]:
    tasks = AccuracyTasks(
        perplexity=[token_set(p, tokenizer) for p in recipe.accuracy.perplexity],
        divergence=token_set(recipe.accuracy.divergence, tokenizer) if recipe.accuracy.divergence else None,
        choices=[choice_set(c.data, c.limit, tokenizer) for c in recipe.accuracy.choices],
    )
    progress.stage("accuracy", tasks.steps() * len(engines))
    result = evaluate_accuracy(engines, recipe.accuracy.baseline, tasks, folder / "work", lambda *_: progress.advance())
    return result | {"machine": describe_machine()}


def token_set(asked: Perplexity | Divergence, tokenizer: Tokenizer) -> TokenSet:
    return TokenSet(asked.data, tuple(eval_windows(asked.data, asked.tokens, asked.context, tokenizer)))


def choice_set(data: str, limit: int | None, tokenizer: Tokenizer) -> ChoiceSet:
    found = load_choices(data, tokenizer)
    return ChoiceSet(found.name, found.questions[:limit])


def measure_parity(folder: Path, recipe: Recipe, source: ModelSource, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Float, simulated and served run of the same tokens. The simulation is Paddle's, the other two the runtime's."""
    from quantbench.calibrate.simulate import simulate

    assert recipe.parity is not None
    first = recipe.accuracy.perplexity[0] if recipe.accuracy.perplexity else Perplexity()
    context = min(first.context, recipe.parity.tokens + 1, PARITY_CONTEXT)
    windows = [w.tolist() for w in eval_windows(first.data, recipe.parity.tokens, context, source.tokenizer())]
    progress.stage("parity", len(plan.variants))
    bases: dict[str | tuple[int, ...], list[Trace]] = {}  # the float model behind each prefix
    variants = {}
    for name, planned in plan.variants.items():
        if planned.prefix not in bases:
            prefix = kept_prefix(folder, planned.prefix, source.config)
            bases[planned.prefix] = float_states(Engine.load(source, "fp32", prefix=prefix), windows)
        checkpoint = open_model(checkpoint_path(folder, name))
        judged, engine = Parity(), Engine.load(checkpoint)
        for window, float_trace in zip(windows, bases[planned.prefix], strict=True):
            served = engine.trace(window)
            followed = simulate(checkpoint, window, followed=served.hidden)
            free = simulate(checkpoint, window, taps=False).logits
            judged.add(float_trace, followed, served, free)
        variants[name] = judged.result()
        gc.collect()
        progress.advance()
    return {"tokens": sum(map(len, windows)), "variants": variants, "machine": describe_machine()}


def float_states(engine: Engine, windows: list[list[int]]) -> list[Trace]:
    """Traces with nothing but the hidden states, which is all that is compared with the float model."""
    return [Trace(hidden=engine.trace(window).hidden) for window in windows]


def measure_speed(folder: Path, recipe: Recipe, engines: Engines, progress: Progress) -> dict[str, Any]:
    asked = recipe.throughput
    assert asked is not None
    progress.stage("throughput", asked.rounds * len(engines))
    load = Load(asked.prompt, asked.output, asked.batches)
    specs = {name: replace(spec, threads=asked.threads) for name, spec in engines.items()}
    return measure_throughput(specs, recipe.accuracy.baseline, load, asked.rounds, lambda *_: progress.advance())


def judge(folder: Path, recipe: Recipe, source: ModelSource) -> list[GateResult]:
    """Hold the measurements against the recipe's gates: gates.json. A gate on nothing measured is an error."""
    accuracy, throughput, parity = (read(folder / name) for name in MEASUREMENTS)
    results = evaluate_gates(recipe.gate_limits(), accuracy, throughput, parity, sizes(folder, recipe, source))
    rows = [
        {
            "name": r.gate,
            "variant": r.variant,
            "limit": r.limit,
            "value": r.value,
            "passed": r.passed,
            "why": r.sentence,
        }
        for r in results
    ]
    if rows:
        (folder / GATES_FILE).write_text(json.dumps({"gates": rows}, indent=1))
    return results


def read(path: Path) -> Any:
    """The content of a JSON file; None where its stage was switched off."""
    return json.loads(path.read_text()) if path.exists() else None


def sizes(folder: Path, recipe: Recipe, source: ModelSource) -> dict[str, int]:
    """Bytes of tensors of the baseline and of every checkpoint of the run."""
    bytes_each = 4 if recipe.accuracy.baseline == "fp32" else 2
    found = {recipe.accuracy.baseline: bytes_each * sum(map(math.prod, model_tensors(source.config).values()))}
    for variant in recipe.modes:
        shards = checkpoint_path(folder, variant.name).glob("*.safetensors")
        found[variant.name] = sum(shard.stat().st_size for shard in shards)
    return found
