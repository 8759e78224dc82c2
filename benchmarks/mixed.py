"""Mixed precision beside what is uniform: int4, int8 and splits by block against `quantbench search` at the same bytes.

    python benchmarks/mixed.py --int8-blocks 15 --json benchmarks/results/mixed.json

Calibrates round-to-nearest int4 (groups of 64 and of 32), int8, and, for every count of --int8-blocks, int4 with so
many blocks in int8: the first, the last, both ends, evenly spread. The bytes of such a split are the budget of a
search whose recipe is calibrated twice. All are served on text that nothing was chosen by. What --work holds is used
again, so a run that was cut off goes on. Exits with 1 where the search does not beat all that is uniform at its bytes,
or where its recipe does not give the same checkpoint and the same figures twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ("int4", "int4-g32", "int8")
TWICE = ("first", "second")
Words = dict[str, Any]


def splits(layers: int, count: int) -> dict[str, list[int]]:
    """Name -> the blocks that are int8, `count` of `layers`."""
    half = (count + 1) // 2
    return {
        f"first-{count}": list(range(count)),
        f"last-{count}": list(range(layers - count, layers)),
        f"ends-{count}": [*range(half), *range(layers - (count - half), layers)],
        f"spread-{count}": [i * layers // count for i in range(count)],
    }


def recipe_of(args: argparse.Namespace, layers: int) -> Words:
    """Candidates and splits, all by rounding to nearest."""
    modes: list[Words] = [
        {"name": "int4", "mode": "weight_only_int4"},
        {"name": "int4-g32", "mode": "weight_only_int4", "weights": {"group_size": 32}},
        {"name": "int8", "mode": "weight_only_int8"},
    ]
    rules: list[Words] = []
    for count in args.int8_blocks:
        for name, blocks in splits(layers, count).items():
            modes.append({"name": name, "mode": "weight_only_int4"})
            wide = {"mode": "weight_only_int8", "variants": [name]}
            rules += [{"match": f"model.layers.{i}.*", **wide} for i in blocks]
    text = {"data": args.text, "tokens": args.text_tokens, "context": args.context}
    return {
        "model": args.model,
        "modes": modes,
        "rules": rules,
        "calibration": {"data": args.data, "samples": args.samples, "length": 256, "seed": 0},
        "accuracy": {"baseline": "fp32", "perplexity": [text]},
        "throughput": "off",
        "parity": "off",
        "output": str(args.work / "uniform"),
    }


def quantbench(*arguments: object) -> str:
    """The command line in a process of its own; what it prints. Raises CalledProcessError."""
    command = [sys.executable, "-m", "quantbench", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def calibrated(recipe: Path, folder: Path) -> Path:
    """The finished run of `recipe` in `folder`, calibrated unless it is there."""
    if not (folder / "report.json").is_file():
        resume = ["--resume"] if (folder / "recipe.lock.yaml").is_file() else []
        quantbench("calibrate", recipe, *resume, "--set", f"output={folder}")
    return folder


def figures(folder: Path) -> dict[str, Words]:
    """Variant -> bytes of its tensors, served perplexity and divergence."""
    accuracy, plan = (json.loads((folder / name).read_text()) for name in ("accuracy.json", "plan.json"))
    perplexity, divergence = (accuracy[kind][0]["variants"] for kind in ("perplexity", "divergence"))
    sizes = plan["forecast"]["checkpoint_bytes"]
    return {name: {"bytes": sizes[name]} | perplexity[name] | divergence[name] for name in sizes}


def searched(args: argparse.Namespace, run: Path, budget: int) -> Words:
    """The choice for a budget of bytes, and what its recipe comes to when it is calibrated twice."""
    recipe = args.work / f"mixed-{budget}.yaml"
    asked = ["--modes", ",".join(CANDIDATES), "--tokens", args.tokens, "-o", recipe, "--overwrite", "--json"]
    found = json.loads(quantbench("search", run, "--budget-bytes", budget, *asked))["chosen"]
    runs = [calibrated(recipe, args.work / f"mixed-{budget}-{name}") for name in TWICE]
    first, again = (figures(folder)["mixed"] for folder in runs)
    prints = [hashlib.sha256(b"".join(weights(folder))).hexdigest() for folder in runs]
    same = {"same_bytes_twice": prints[0] == prints[1], "same_figures_twice": first == again}
    return first | same | {"summed_kl": found["loss"], "groups": found["counts"], "sha256": prints[0]}


def weights(folder: Path) -> Iterator[bytes]:
    files = (folder / "checkpoint" / "mixed").glob("*.safetensors")
    return (file.read_bytes() for file in sorted(files))


def compared(args: argparse.Namespace) -> Words:
    from quantbench.infer.checkpoint.source import open_model
    from quantbench.infer.validate.machine import describe_machine

    args.work.mkdir(parents=True, exist_ok=True)
    recipe = args.work / "uniform.yaml"
    words = recipe_of(args, open_model(args.model).config.num_layers)
    recipe.write_text(str(yaml.safe_dump(words, sort_keys=False)))
    run = calibrated(recipe, args.work / "uniform")
    uniform = figures(run)
    mixed = {}
    for count in args.int8_blocks:
        budget = uniform[f"first-{count}"]["bytes"]
        within = {name: f for name, f in uniform.items() if f["bytes"] <= budget}
        best = min(within, key=lambda name: within[name]["kl"])
        mixed[f"search-{count}"] = searched(args, run, budget) | {"budget": budget, "best_uniform": best}
    return {
        "uniform": uniform,
        "mixed": mixed,
        "recipe": {k: v for k, v in words.items() if k not in ("model", "output")},
        "loss_tokens": args.tokens,
        "date": date.today().isoformat(),
        "machine": describe_machine(None),
    }


def shown(found: Words) -> str:
    rows = ["checkpoint             bytes  perplexity  increase      KL  (95 % interval)   top-1"]
    for name, f in sorted((found["uniform"] | found["mixed"]).items(), key=lambda item: item[1]["bytes"]):
        low, high = f["kl_interval"] or (f["kl"], f["kl"])
        cells = f"{f['bytes']:>16,}  {f['perplexity']:>10.2f}  {f['increase']:>+8.1%}  {f['kl']:>6.4f}"
        rows.append(f"{name:<12}{cells}  ({low:.4f}-{high:.4f})  {f['top1']:.1%}")
    for name, f in found["mixed"].items():
        best = found["uniform"][f["best_uniform"]]
        twice = "the same" if f["same_bytes_twice"] and f["same_figures_twice"] else "NOT the same"
        rows.append(f"{name}: KL {f['kl']:.4f} against {best['kl']:.4f} of {f['best_uniform']}; twice: {twice}")
    return "\n".join(rows)


def failed(found: Words) -> bool:
    """Whether a search is no better than the best uniform recipe of its bytes, or not the same twice."""
    return any(
        f["kl"] >= found["uniform"][f["best_uniform"]]["kl"] or not (f["same_bytes_twice"] and f["same_figures_twice"])
        for f in found["mixed"].values()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2")
    parser.add_argument("--int8-blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--tokens", type=int, default=256, help="of calibration text, that losses are measured on")
    parser.add_argument("--data", default="demo:wikipedia")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", default="demo:wikipedia-heldout")
    parser.add_argument("--text-tokens", type=int, default=4088)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mixed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    found = compared(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(shown(found))
    return int(failed(found))


if __name__ == "__main__":
    sys.exit(main())
