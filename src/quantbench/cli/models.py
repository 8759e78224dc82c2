"""Commands that run a model on the bundled runtime: eval, bench, generate."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from quantbench.cli.app import app
from quantbench.cli.show import print_json, print_rows
from quantbench.errors import DataError, RequestError, unknown

DEVICES = ("cpu", "cuda")
MODEL = "A checkpoint, a HF directory, a GGUF file, a demo name or a fetched hub name."
Model = Annotated[str, typer.Argument(help=MODEL)]
ModeOption = Annotated[str | None, typer.Option("--mode", help="Run a float model as fp32, bf16, weight_only_int8, …")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all this process may use")]
Device = Annotated[str, typer.Option("--device", help="cpu, or cuda for an NVIDIA GPU.")]
PROFILE = ("model", "stage", "operation", "ms", "share", "GB/s", "GOP/s")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("eval")
def evaluate(
    model: Model,
    mode: ModeOption = None,
    text: Annotated[str | None, typer.Option("--text", help="A UTF-8 text file or a demo text.")] = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to predict.")] = 4088,
    choices: Annotated[Path | None, typer.Option("--choices", help="JSONL of {question, choices, answer}.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="Compare with this model: KL, top-1.")] = None,
    against_mode: Annotated[str | None, typer.Option("--against-mode", help="Mode of --against.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Perplexity, divergence and multiple choice of any model, as served."""
    from quantbench.infer.validate.evaluate import Evaluation, evaluate_model
    from quantbench.infer.validate.visit import EngineSpec
    from quantbench.reports.progress import open_progress

    ops = ops_of(device)
    other = EngineSpec(against, against_mode, ops, threads) if against else None
    asked = Evaluation(EngineSpec(model, mode, ops, threads), text, context, tokens, choices, other)
    with open_progress() as progress:
        progress.stage("evaluate")
        result = evaluate_model(asked, lambda *_: progress.advance())
    if json:
        print_json(result)
        return
    for kind in ("perplexity", "divergence", "choices"):
        for measure in result[kind]:
            rows = [[name, *values.values()] for name, values in measure["variants"].items()]
            longest = max(measure["variants"].values(), key=len)
            typer.echo(f"{kind} on {measure['data']}")
            print_rows(["model", *longest], [row + [None] * (len(longest) + 1 - len(row)) for row in rows])


def ops_of(device: str) -> str:
    """The op table of a device. Raises RequestError for an unknown one."""
    if device not in DEVICES:
        raise RequestError(unknown("--device", device, DEVICES))
    return device


@app.command("bench")
def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    mode: Annotated[list[str] | None, typer.Option("--mode", help="Modes to run in turn; repeat the option.")] = None,
    batches: Annotated[str, typer.Option("--batches", help="Decode batch sizes, comma separated.")] = "1,8",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens.")] = 128,
    output: Annotated[int, typer.Option("--output", min=2, help="Tokens generated.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds over all modes.")] = 3,
    threads: Threads = None,
    device: Device = "cpu",
    config: Annotated[str | None, typer.Option("--config", help="With --random-weights: llama-3-8b, …")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="On a GPU, without a checkpoint.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Where a step goes, by operation.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Between operations: bfloat16, float16, float32.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Prefill and decode speed against this machine's measured ceilings; the first mode is the baseline."""
    if config is not None or random_weights:
        from quantbench.cli.gpu import Asked, bench_random

        asked = Asked(config, random_weights, model, device, [*(mode or ["bf16"])], batches, profile, dtype)
        bench_random(asked, json)
        return
    if model is None:
        raise RequestError("nothing to measure: give a model, or --config NAME --random-weights --device cuda")
    from quantbench.infer.validate.evaluate import bench_model
    from quantbench.infer.validate.timing import Load
    from quantbench.infer.validate.visit import EngineSpec
    from quantbench.reports.progress import open_progress

    ops = ops_of(device)
    load = Load(prompt, output, batch_sizes(batches))
    modes: list[str | None] = [*mode] if mode else [None]
    specs = [EngineSpec(model, m, ops, threads) for m in modes]
    with open_progress() as progress:
        progress.stage("bench", rounds * len(specs))
        result = bench_model(specs, load, rounds, lambda *_: progress.advance())
    if json:
        print_json(result)
        return
    typer.echo("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in result["ceilings"].items()))
    columns = ["model", "stage", "tokens/s", "min", "max", "share of ceiling", "why"]
    print_rows(columns, [row for name, found in result["variants"].items() for row in speed_rows(name, found)])
    if profile:
        print_rows(PROFILE, [row for name, found in result["variants"].items() for row in profile_rows(name, found)])


def profile_rows(name: str, found: dict[str, Any]) -> Iterator[list[Any]]:
    """Operations of a decode step; only the kinds of work, without rates, where the step is not native."""
    for batch, row in found["decode"].items():
        stage, total = f"decode@{batch}", sum(row["profile_ms"].values())
        if "operations" in row:
            for operation, spent in row["operations"].items():
                yield [name, stage, operation, *(spent[k] or None for k in ("ms", "share", "gb_per_s", "gop_per_s"))]
        else:
            for kind, ms in row["profile_ms"].items():
                yield [name, stage, kind, ms, ms / total, None, None]


def batch_sizes(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise RequestError(f"--batches {text!r}: give positive whole numbers separated by commas, such as 1,8,32")
    return tuple(map(int, words))


def speed_rows(name: str, found: dict[str, Any]) -> Iterator[list[Any]]:
    stages = {"prefill": found["prefill"]} | {f"decode@{b}": row for b, row in found["decode"].items()}
    for stage, row in stages.items():
        speed = row["tokens_per_s"]
        yield [name, stage, speed["median"], speed["min"], speed["max"], row.get("share_of_ceiling"), row["why"]]


@app.command("generate")
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from stdin when left out.")] = None,
    mode: ModeOption = None,
    data_file: Annotated[Path | None, typer.Option("--data-file", help='JSONL of {"src": …, "tgt": …}.')] = None,
    output_file: Annotated[Path, typer.Option("--output-file", help="Answers to --data-file.")] = Path("output.json"),
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Use the model's chat template where it has one.")] = True,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 = greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 = off.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop string; repeat the option for more.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Text from any model: one prompt streamed to stdout, or a JSONL file answered in batches."""
    from quantbench.infer.engine import Engine, SamplingParams

    records = list(read_prompts(data_file)) if data_file else []
    engine = Engine.load(model, mode, ops=ops_of(device), threads=threads)
    tokenizer = engine.tokenizer
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ())
    )

    def encode(text: str) -> list[int]:
        if chat and tokenizer.has_chat_template:
            return tokenizer.chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    if data_file:
        answers = engine.generate([encode(r["src"]) for r in records], params)
        lines = [
            jsonlib.dumps(r | {"output": a.text}, ensure_ascii=False) for r, a in zip(records, answers, strict=True)
        ]
        output_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        typer.echo(f"{len(records)} answers in {output_file}", err=True)
        return
    for token in engine.stream(encode(sys.stdin.read() if prompt is None else prompt), params):
        typer.echo(token.text, nl=False)
    typer.echo("")


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file whose `src` is a string or a list of strings (joined). DataError with file:line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data-file takes JSONL with a 'src' field per line")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield prompt_of(line, f"{path}:{number}")


def prompt_of(line: str, where: str) -> dict[str, Any]:
    try:
        record = jsonlib.loads(line)
    except jsonlib.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); each line is an object with a 'src' field") from None
    source = record.get("src") if isinstance(record, dict) else None
    text = "".join(map(str, source)) if isinstance(source, list) else source
    if not isinstance(text, str) or not text:
        raise DataError(f'{where}: no \'src\' text; each line is an object such as {{"src": "…", "tgt": "…"}}')
    return {**record, "src": text}
