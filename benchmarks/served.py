"""What every bundled recipe reaches on real models, as served, beside round to nearest, and what that takes.

    python benchmarks/served.py list                                   # the entries
    python benchmarks/served.py run                                    # all of them on demo:smollm2
    python benchmarks/served.py run --model qwen=path/to/Qwen2.5-Coder-0.5B-Instruct --only qwen
    python benchmarks/served.py run --only smollm2/w8a8-static-smooth  # one entry, replaced in the results
    python benchmarks/served.py page                                   # docs/results.md from the results alone

An entry is one recipe on one model: a preset that quantizes one variant, or its counterpart by rounding to nearest
with absmax ranges, which presets of one mode share. Each is calibrated in a process of its own: seconds are those of
that process on the clock, imports and reading included, bytes the most memory it held. Then all checkpoints of a model
are served in one process beside the float32 model. Checkpoints stay in --work, and what is calibrated there already is
not calibrated again unless --again; finished entries are written to the results at once, over those of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from served_entries import CALIBRATION, Entry, Words, entries, text_of

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"demo:smollm2": "SmolLM2-135M-Instruct"}
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"


class ChildError(Exception):
    """A process that this script started has failed, after saying why."""


@dataclass(frozen=True)
class Text:
    """What is predicted: 8 windows, the first 4,096 tokens of the text."""

    data: str = "demo:wikipedia-heldout"
    tokens: int = 4088
    context: int = 512


def calibrate(entry: Entry, spec: str, folder: Path, threads: int) -> Words:
    """Calibrate an entry in a process of its own, unless `folder` holds it; what that took. Raises ChildError."""
    recipe, told = folder.with_suffix(".yaml"), folder.with_suffix(".json")
    text = text_of(entry.words, spec, str(folder))
    if told.exists() and recipe.exists() and recipe.read_text() == text:
        return dict(json.loads(told.read_text()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)
    recipe.write_text(text)
    begin = time.perf_counter()
    found = child("--calibrate", str(recipe), threads=threads)
    found = {"seconds": time.perf_counter() - begin, **found}
    shutil.rmtree(folder / "statistics", ignore_errors=True)  # Hessians of a model are several times its checkpoint
    told.write_text(json.dumps(found))
    return found


def child(*arguments: str, threads: int) -> Words:
    """This script again, on `threads` processors, and the JSON object that it prints. Raises ChildError."""
    count = str(threads)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    command = [sys.executable, __file__, *arguments, "--threads", count]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
    if done.returncode != 0:
        raise ChildError(f"failed: {shlex.join(command)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child_calibrates(recipe: str) -> Words:
    """In the child: the calibration alone, and the most memory it held."""
    from quantbench.infer.validate.visit import peak_rss_bytes
    from quantbench.pipeline import Options, load, prepare, quantize
    from quantbench.process import reuse_freed_memory
    from quantbench.reports.progress import PlainProgress

    options = Options(overwrite=True)
    reuse_freed_memory()
    with PlainProgress(sys.stderr) as progress:
        run = load(recipe, options)
        quantize(run, prepare(run, options), options, progress)
    return {"peak_rss_bytes": peak_rss_bytes()}


def child_serves(spec: str, checkpoints: dict[str, str], threads: int, asked: Text) -> Words:
    """In the child: accuracy.json of several checkpoints beside the float32 model, with sizes and the machine."""
    from quantbench.calibrate.data import eval_windows
    from quantbench.infer.checkpoint.source import open_model
    from quantbench.infer.validate.accuracy import AccuracyTasks, TokenSet, evaluate_accuracy
    from quantbench.infer.validate.machine import describe_machine
    from quantbench.infer.validate.visit import EngineSpec
    from quantbench.pipeline import versions
    from quantbench.reports.arrays import bytes_by_kind
    from quantbench.reports.progress import PlainProgress

    source = open_model(spec)
    text = TokenSet(asked.data, tuple(eval_windows(asked.data, asked.tokens, asked.context, source.tokenizer())))
    tasks = AccuracyTasks(perplexity=[text], divergence=text)
    engines = {"fp32": EngineSpec(spec, "fp32", threads=threads)}
    engines |= {name: EngineSpec(path, threads=threads) for name, path in checkpoints.items()}
    with PlainProgress(sys.stderr) as progress:
        progress.stage("serve", tasks.steps() * len(engines))
        work = Path(next(iter(checkpoints.values()))).parents[1]
        found = evaluate_accuracy(engines, "fp32", tasks, work, lambda *_: progress.advance())
    sizes = {name: bytes_by_kind(Path(path)) for name, path in checkpoints.items()}
    return found | {
        "sizes": sizes,
        "machine": describe_machine(threads),
        "versions": versions(),
        "title": TITLES.get(spec, source.name),
    }


def served(found: Words, entry: Entry, family: str, took: Words) -> Words:
    """The record of one entry, from what its calibration took and from what the child that served it found."""
    perplexity, sizes = found["perplexity"][0]["variants"], found["sizes"][entry.key]
    return (
        asdict(entry)
        | {"title": found["title"], "family": family, "baseline_perplexity": perplexity["fp32"]["perplexity"]}
        | {**perplexity[entry.key], **found["divergence"][0]["variants"][entry.key]}
        | {
            "bytes": sum(sizes.values()),
            "linear_bytes": sizes.get("attention", 0) + sizes.get("feed-forward", 0),
            "calibration_s": took["seconds"],
            "calibration_peak_rss_bytes": took["peak_rss_bytes"],
            "date": date.today().isoformat(),
            "command": f"python benchmarks/served.py run --only {entry.key}",
            "machine": found["machine"],
            "versions": found["versions"],
        }
    )


def record(path: Path, new: dict[str, Words]) -> None:
    """Put `new` entries into the results, over those of the same name, in one step."""
    results: Words = json.loads(path.read_text()) if path.exists() else {"entries": {}}
    results |= {"text": asdict(Text()), "calibration": CALIBRATION}
    results["entries"] |= new
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def models_of(given: Sequence[str]) -> dict[str, str]:
    """Name -> what `open_model` takes, of "name=spec" words; smollm2 is always there."""
    return {"smollm2": "demo:smollm2"} | dict(word.split("=", 1) for word in given)


def chosen(models: dict[str, str], only: Sequence[str]) -> Iterator[tuple[str, str, list[Entry]]]:
    """Model spec, family and entries of every model that is asked for."""
    from quantbench.infer.checkpoint.source import open_model

    for model, spec in models.items():
        if only and not any(word.split("/")[0] == model for word in only):
            continue
        family = open_model(spec).config.family
        found = [e for e in entries(model, family) if not only or e.key in only or model in only]
        if missing := [w for w in only if w.startswith(f"{model}/") and w not in {e.key for e in found}]:
            raise SystemExit(f"no such entry: {', '.join(missing)}. `list` names them all")
        yield spec, family, found


def run(args: argparse.Namespace) -> None:
    failed: list[str] = []
    for spec, family, found in chosen(models_of(args.model), args.only):
        folders = {e.key: args.work / e.key for e in found}
        if args.again:
            for folder in folders.values():
                folder.with_suffix(".json").unlink(missing_ok=True)
        took: dict[str, Words] = {}
        for entry in found:
            try:
                took[entry.key] = calibrate(entry, spec, folders[entry.key], args.threads)
            except ChildError as error:
                failed.append(str(error))  # the others go on: a run takes long
        if took:
            checkpoints = {key: str(folders[key] / "checkpoint" / "served") for key in took}
            answer = child("--serve", json.dumps([spec, checkpoints]), threads=args.threads)
            record(args.results, {e.key: served(answer, e, family, took[e.key]) for e in found if e.key in took})
    if failed:
        raise SystemExit("\n".join(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "page"), nargs="?")
    parser.add_argument("--model", action="append", default=[], help="NAME=SPEC, beside smollm2=demo:smollm2")
    parser.add_argument("--only", nargs="*", default=[], help="models or model/entry")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "served")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="calibrate what is calibrated already")
    parser.add_argument("--calibrate", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.calibrate:
        print(json.dumps(child_calibrates(args.calibrate)))
    elif args.serve:
        print(json.dumps(child_serves(*json.loads(args.serve), args.threads, Text())))
    elif args.command == "list":
        for _, _, found in chosen(models_of(args.model), args.only):
            print("\n".join(f"{e.key:<40} {e.mode:<40} {e.method}" for e in found))
    elif args.command == "run":
        run(args)
    elif args.command == "page":
        from served_page import write_page

        write_page(args.results)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
