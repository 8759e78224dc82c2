"""Decoding with a quantized KV cache beside the same weights with a float one, step by step in turn, at a long context.

A step of one is followed by a step of the other, and the next pair begins with the other one: what slows the machine
down slows both. `ratio` is of the medians of the steps' seconds: above 1 the quantized cache is faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median, quantiles

from quantbench.infer.engine import Engine, Request, SamplingParams


@dataclass(frozen=True)
class Pairs:
    """Seconds of each step at one batch, in the order they were taken. `cache`: format of the quantized one."""

    cache: str
    batch: int
    context: int
    float_cache: list[float]
    quantized: list[float]

    @property
    def ratio(self) -> float:
        return median(self.float_cache) / median(self.quantized)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the ratios of the pairs."""
        low, _, high = quantiles([f / q for f, q in zip(self.float_cache, self.quantized, strict=True)], n=4)
        return low, high


def fill(engine: Engine, batch: int, context: int, steps: int) -> list[int]:
    """Sequences of `context` tokens that decode for `steps` steps."""
    params = SamplingParams(max_tokens=steps + 2 * batch + 2, ignore_eos=True, detokenize=False)
    prompts = ([(11 * i + 131 * s) % 499 + 3 for i in range(context)] for s in range(batch))
    numbers = [engine.add(Request(prompt, params)) for prompt in prompts]
    waiting = set(numbers)
    while waiting:
        waiting -= {output.request for output in engine.step()}
    return numbers


def compare(engines: tuple[Engine, Engine], batch: int, context: int, steps: int) -> Pairs:
    """`engines`: with the float cache, with the quantized one."""
    running = [fill(engine, batch, context, steps) for engine in engines]
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(steps):
        for which in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            engines[which].step()
            seconds[which].append(time.perf_counter() - start)
    for engine, numbers in zip(engines, running, strict=True):
        for number in numbers:
            engine.abort(number)
    return Pairs(engines[1].mode.cache, batch, context, *seconds)


def show(found: list[Pairs]) -> None:
    told = "steps in turn: ms per step, ratio of medians (quartiles of the pairs)"
    print(f"\nquantized beside bf16 KV cache, a8w8+head, {told}")
    for pairs in found:
        low, high = pairs.quartiles
        times = f"{median(pairs.float_cache) * 1e3:.2f} and {median(pairs.quantized) * 1e3:.2f} ms"
        ratio = f"x{pairs.ratio:.3f} ({low:.3f} to {high:.3f})"
        print(f"  context {pairs.context}, b{pairs.batch}: {times}, {pairs.cache} {ratio}")
