"""Commands that run a model on the bundled runtime: eval, bench, generate. MODEL is a checkpoint, HF directory, GGUF or demo name."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from quantbench.cli import app
from quantbench.errors import DataError, RequestError

Model = Annotated[
    str, typer.Argument(help="A checkpoint, a HF directory, a GGUF file, a demo name or a fetched hub name.")
]
ModeOption = Annotated[
    str | None, typer.Option("--mode", help="Run a float model as fp32, bf16, fp16, weight_only_int8, …")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: all this process may use.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("eval")
def evaluate(
    model: Model,
    mode: ModeOption = None,
    text: Annotated[
        str, typer.Option("--text", help="A text file, or demo:wikipedia-heldout.")
    ] = "demo:wikipedia-heldout",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to predict.")] = 4088,
    choices: Annotated[Path | None, typer.Option("--choices", help="JSONL of {question, choices, answer}.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A model to take KL and top-1 agreement against.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity, divergence and multiple choice of any model, as served."""
    from quantbench.evaluation import Evaluation, evaluate_model, rows

    result = evaluate_model(Evaluation(model, mode, text, context, tokens, choices, against, threads))
    typer.echo(jsonlib.dumps(result, indent=1) if json else "\n".join(rows(result)))


@app.command("bench")
def bench(
    model: Model,
    mode: Annotated[list[str] | None, typer.Option("--mode", help="Modes to run in turn; repeat the option.")] = None,
    batches: Annotated[str, typer.Option("--batches", help="Decode batch sizes, comma separated.")] = "1,8",
    prompt: Annotated[int, typer.Option("--prompt", min=1)] = 128,
    output: Annotated[int, typer.Option("--output", min=2)] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 3,
    threads: Threads = None,
    device: Annotated[str, typer.Option("--device", help="cpu; cuda is not built yet.")] = "cpu",
    json: Json = False,
) -> None:
    """Prefill and decode speed against this machine's measured ceilings."""
    from quantbench.evaluation import bench_rows, run_bench

    if device != "cpu":
        raise RequestError(f"--device {device}: this build has no {device} runtime. Known: cpu")
    sizes = [int(b) for b in batches.split(",") if b.strip().isdigit() and int(b) > 0]
    if len(sizes) != len(batches.split(",")):
        raise RequestError(f"--batches {batches!r}: give positive whole numbers separated by commas, such as 1,8,32")
    result = run_bench(model, mode or [], sizes, prompt=prompt, output=output, rounds=rounds, threads=threads)
    typer.echo(jsonlib.dumps(result, indent=1) if json else "\n".join(bench_rows(result)))


@app.command("generate")
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from stdin when left out.")] = None,
    mode: ModeOption = None,
    data_file: Annotated[Path | None, typer.Option("--data-file", help='JSONL of {"src": …, "tgt": …}.')] = None,
    output_file: Annotated[Path, typer.Option("--output-file", help="Where --data-file answers go, as JSONL.")] = Path(
        "output.json"
    ),
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Use the model's chat template where it has one.")] = True,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 = greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 = off.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop string; repeat the option for more.")] = None,
    threads: Threads = None,
) -> None:
    """Text from any model: one prompt streamed to stdout, or a JSONL file answered in batches."""
    from quantbench.infer.engine import Engine, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ())
    )
    engine = Engine.load(model, mode, threads=threads)
    tokenizer = engine.tokenizer
    encode = (
        (lambda text: tokenizer.chat([{"role": "user", "content": text}]))
        if chat and tokenizer.chat_template
        else tokenizer.encode
    )
    if data_file is not None:
        records = list(read_prompts(data_file))
        answers = engine.generate([encode(r["src"]) for r in records], params)
        with output_file.open("w", encoding="utf-8") as out:
            for record, answer in zip(records, answers, strict=True):
                out.write(jsonlib.dumps(record | {"output": answer.text}, ensure_ascii=False) + "\n")
        typer.echo(f"{len(records)} answers in {output_file}", err=True)
        return
    for token in engine.stream(encode(prompt if prompt is not None else sys.stdin.read()), params):
        typer.echo(token.text, nl=False)
    typer.echo("")


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file whose `src` is a string or a list of strings (joined). Raises DataError with file:line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data-file takes JSONL with a 'src' field per line")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = jsonlib.loads(line)
        except jsonlib.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}); each line is an object with a 'src' field"
            ) from None
        source = record.get("src") if isinstance(record, dict) else None
        if isinstance(source, list):
            source = "".join(map(str, source))
        if not isinstance(source, str) or not source:
            raise DataError(
                f'{path}:{number}: no \'src\' text; each line is an object such as {{"src": "…", "tgt": "…"}}'
            )
        yield record | {"src": source}
