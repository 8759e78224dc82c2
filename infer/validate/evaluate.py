"""`quantbench eval` and `quantbench bench`: the same measurements for any model, without a recipe or a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantbench.errors import DataError
from quantbench.infer.checkpoint.demo import TEXTS, demo_text
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.validate.accuracy import AccuracyTasks, Progress, TokenSet, cut_windows, evaluate_accuracy
from quantbench.infer.validate.choices import Encoder, load_choices
from quantbench.infer.validate.machine import describe_machine
from quantbench.infer.validate.throughput import measure_throughput
from quantbench.infer.validate.timing import Load
from quantbench.infer.validate.visit import EngineSpec

CHARACTERS_PER_TOKEN = 8  # more than any text needs: so much of it is encoded, not all of a book


@dataclass(frozen=True)
class Evaluation:
    """What `eval` measures. `text`: a UTF-8 file or a demo text; `tokens` are those that are scored."""

    model: EngineSpec
    text: str | None = None
    context: int = 512
    tokens: int | None = 4088
    choices: Path | None = None
    against: EngineSpec | None = None


def evaluate_model(asked: Evaluation, progress: Progress = lambda variant, done, total: None) -> dict[str, Any]:
    """Accuracy of one model; with `against` also its increase, divergence and deltas from that one: as accuracy.json.

    Raises DataError where there is neither a text nor questions, and for what cannot be read in them.
    """
    if asked.text is None and asked.choices is None:
        raise DataError("nothing to evaluate: give a text (--text FILE) or questions (--choices FILE.jsonl)")
    names = [label(asked.model), *([label(asked.against)] if asked.against else [])]
    if len(set(names)) < len(names):
        raise DataError(f"{names[0]} would be compared with itself; give another model or mode")
    variants = {names[0]: asked.model} | ({names[-1]: asked.against} if asked.against else {})
    tokenizer = open_model(asked.model.model).tokenizer()
    data = read_windows(asked.text, tokenizer, asked.context, asked.tokens) if asked.text else None
    tasks = AccuracyTasks(
        perplexity=[data] if data else [],
        divergence=data if asked.against else None,
        choices=[load_choices(asked.choices, tokenizer)] if asked.choices else [],
    )
    with tempfile.TemporaryDirectory(prefix="quantbench-") as work:
        result = evaluate_accuracy(variants, names[-1], tasks, work, progress)
    return {"machine": describe_machine(asked.model.threads), **result}


def bench_model(
    specs: Mapping[str, EngineSpec] | Sequence[EngineSpec],
    load: Load,
    rounds: int = 3,
    progress: Progress = lambda variant, done, total: None,
) -> dict[str, Any]:
    """Speed of one or more models or modes, the first of which is the baseline: as throughput.json."""
    named = dict(specs) if isinstance(specs, Mapping) else {label(s): s for s in specs}
    if not named:
        raise DataError("nothing to measure: give at least one model")
    return measure_throughput(named, next(iter(named)), load, rounds, progress)


def label(spec: EngineSpec) -> str:
    """What a table calls it: the last part of the model's name, and the mode if one was asked for."""
    name = Path(spec.model).name
    return f"{name} {spec.mode}" if spec.mode else name


def read_windows(text: str, tokenizer: Encoder, context: int, tokens: int | None) -> TokenSet:
    """Windows of a UTF-8 file or a demo text. Raises DataError where it is missing, not text, or too short."""
    content = "\n\n".join(demo_text(text)) if text in TEXTS else _read(Path(text))
    needed = len(content) if tokens is None else -(-tokens // max(context - 1, 1)) * context
    ids = tokenizer.encode(content[: needed * CHARACTERS_PER_TOKEN])
    if len(ids) <= needed:  # a text of long words, or the cut went through the last one
        ids = tokenizer.encode(content)
    return cut_windows(text, ids, context, tokens)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a UTF-8 text file or one of {', '.join(sorted(TEXTS))}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
