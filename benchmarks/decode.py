"""Speed of the engine's modes against each other, on one model, in one process.

    python benchmarks/decode.py MODEL --modes fp32,bf16,a8w8 --threads 1 --rounds 5

Modes are measured in turn (A B C A B C …), so that a machine that slows down or is shared slows all of them alike, and
compared round by round: the ratio is the median of the rounds' ratios to the first mode, its spread their extremes.
Prefill is one prompt of 512 tokens up to its first token, decode the steps after that. Nothing is reused between runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from datetime import date

from quantbench.infer.engine import Engine, Request, SamplingParams

PROMPT = 512
SHORT = 32  # prompt of a decode measurement


@dataclass
class Measured:
    """Tokens per second of one mode, one value per round."""

    prefill: list[float] = field(default_factory=list)
    decode: dict[int, list[float]] = field(default_factory=dict)

    def columns(self) -> dict[str, list[float]]:
        return {f"prefill {PROMPT}": self.prefill} | {f"decode b{b}": rates for b, rates in self.decode.items()}


def prefill_rate(engine: Engine) -> float:
    """Prompt tokens per second of one prompt."""
    prompt = [(7 * i) % 997 + 3 for i in range(PROMPT)]
    begin = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False))
    return PROMPT / (time.perf_counter() - begin)


def decode_rate(engine: Engine, batch: int, steps: int) -> float:
    """Generated tokens per second of `batch` sequences together."""
    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    for number in range(batch):
        engine.add(Request([(11 * i + number) % 997 + 3 for i in range(SHORT)], params))
    waiting = batch
    while waiting:  # prefill, until every sequence has its first token
        waiting -= len(engine.step())
    begin, tokens = time.perf_counter(), 0
    while not engine.idle:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - begin)


def measure(engines: dict[str, Engine], batches: list[int], rounds: int, steps: int) -> dict[str, Measured]:
    """`rounds` rounds over all engines in turn, after one that is thrown away (first touches, caches)."""
    found = {name: Measured(decode={b: [] for b in batches}) for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            prefill = prefill_rate(engine)
            decode = {b: decode_rate(engine, b, steps if number else 4) for b in batches}
            if number:
                found[name].prefill.append(prefill)
                for b, rate in decode.items():
                    found[name].decode[b].append(rate)
    return found


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show(found: dict[str, Measured]) -> None:
    first = next(iter(found.values())).columns()
    width = max(map(len, found))
    for column, base in first.items():
        print(f"\n{column}, tokens/s: median (min to max) and ratio to {next(iter(found))}")
        for name, measured in found.items():
            rates = measured.columns()[column]
            ratios = [mine / theirs for mine, theirs in zip(rates, base, strict=True)]
            print(f"  {name:<{width}}  {spread(rates):<28}  x{spread(ratios, 2)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a HF directory, checkpoint, GGUF file or demo name")
    parser.add_argument(
        "--modes", default="fp32,bf16,a8w8", help="separated by commas; 'stored' takes the model as it is"
    )
    parser.add_argument(
        "--against", action="append", default=[], help="another model or checkpoint, as stored (repeat)"
    )
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps per measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    options = {"threads": args.threads, "prefix_reuse": False, "cache_tokens": 16 * PROMPT}
    engines = {
        mode: Engine.load(args.model, None if mode == "stored" else mode, **options) for mode in args.modes.split(",")
    }
    engines |= {path: Engine.load(path, **options) for path in args.against}
    facts = {
        "model": args.model,
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "isa": getattr(next(iter(engines.values())).runner.ops, "isa", "reference"),
        "threads": args.threads,
        "rounds": args.rounds,
    }
    found = measure(engines, [int(b) for b in args.batches.split(",")], args.rounds, args.steps)
    if args.json:
        print(json.dumps(facts | {"tokens_per_s": {name: m.columns() for name, m in found.items()}}, indent=1))
        return
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    show(found)


if __name__ == "__main__":
    main()
