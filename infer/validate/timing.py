"""Times of one loaded engine: prefill alone, and decode at each batch, step by step.

Requests arrive together, run by continuous batching, and ignore the end-of-sequence token. A decode figure counts only
the steps in which every sequence of the batch decodes: the prefill of the late ones is not its matter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from quantbench.errors import RequestError
from quantbench.infer.engine import Engine, Request, SamplingParams
from quantbench.infer.engine.cache import pages_for
from quantbench.infer.ops import PAGE
from quantbench.infer.validate.machine import waited_s
from quantbench.infer.validate.profile import profile_steps
from quantbench.infer.validate.roofline import Work, prefill_work, step_work

CHUNK = 512  # prompt tokens per step
PREFILLS = 3
PROFILED = 3  # steps after the timed ones, which the profile must not slow


@dataclass(frozen=True)
class Load:
    """What is asked of an engine. All counts are tokens or sequences. Raises RequestError listing bad ones."""

    prompt: int = 128
    output: int = 64
    batches: tuple[int, ...] = (1, 8)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"prompt: {self.prompt} tokens; a prompt has at least 1"] if self.prompt < 1 else []
        if self.output < 2:
            problems.append(f"output: {self.output} tokens; the time between tokens needs at least 2")
        if not self.batches or min(self.batches) < 1:
            problems.append(f"batches: {list(self.batches)}; give at least one batch of 1 sequence or more")
        if problems:
            raise RequestError(*problems)

    def limit(self, batch: int) -> int:
        """Tokens to generate so that every timed and profiled step has a full batch, however long prefill takes."""
        return self.output + PROFILED + -(-batch * self.prompt // CHUNK)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + max(self.limit(b) for b in self.batches)

    def engine_options(self) -> dict[str, Any]:
        """Options of Engine.load: room for the largest batch, and no reuse of an earlier prompt's work."""
        rooms = (b * pages_for(self.prompt + self.limit(b)) * PAGE for b in self.batches)
        return {"max_batch": max(self.batches), "cache_tokens": max(rooms), "chunk": CHUNK, "prefix_reuse": False}


@dataclass(frozen=True)
class DecodeTimes:
    """Decode at one batch, seconds. `steps`: of each step with a full batch; `cpu_s`: of all threads, over them;
    `profile`: of `PROFILED` further steps, per step, by kind of work; `operations`: of the same steps, seconds, bytes
    and operations per step of each operation (empty where the step is not native)."""

    steps: list[float]
    first_token: list[float]  # per sequence, from its arrival
    cpu_s: float
    waited_s: float  # for a processor that another process held, over `steps`
    profile: dict[str, float]
    work: Work
    operations: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """One visit to one engine. `prefill`: seconds for the prompt, repeated."""

    prefill: list[float]
    prefill_cpu_s: float
    prefill_work: Work
    decode: dict[int, DecodeTimes]


def time_engine(engine: Engine, load: Load) -> Times:
    """Warm up once, then time prefill and every batch. Raises RequestError where the model's positions are too few."""
    if load.length > engine.config.max_positions:
        raise RequestError(
            f"prompt {load.prompt} and output {load.output} need {load.length} positions at these batches, "
            f"{engine.source.name} has {engine.config.max_positions}; ask for shorter ones"
        )
    prompts = np.random.default_rng(load.seed).integers(0, engine.config.vocab_size, (max(load.batches), load.prompt))
    rows: list[list[int]] = prompts.tolist()
    _prefill(engine, rows[0])  # first touch of every page of the weights
    cpu = time.process_time()
    prefill = [_prefill(engine, rows[0]) for _ in range(PREFILLS)]
    cpu = (time.process_time() - cpu) / PREFILLS
    decode = {b: time_decode(engine, rows[:b], load) for b in load.batches}
    return Times(prefill, cpu, prefill_work(engine, load.prompt), decode)


def _prefill(engine: Engine, prompt: list[int]) -> float:
    start = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    return time.perf_counter() - start


def time_decode(engine: Engine, prompts: Sequence[list[int]], load: Load) -> DecodeTimes:
    """Decode `prompts` together until `load.output` - 1 steps had a full batch, then drop them."""
    params = SamplingParams(max_tokens=load.limit(len(prompts)), ignore_eos=True)
    start = time.perf_counter()
    requests = [engine.add(Request(prompt, params)) for prompt in prompts]
    waiting, first, steps, cpu = set(requests), [], [], 0.0
    while waiting:
        arrived = waiting & {o.request for o in engine.step()}
        first += [time.perf_counter() - start] * len(arrived)
        waiting -= arrived
    wait = waited_s()
    for _ in range(load.output - 1):
        before, cpu_before = time.perf_counter(), time.process_time()
        engine.step()
        steps.append(time.perf_counter() - before)
        cpu += time.process_time() - cpu_before
    wait = waited_s() - wait
    profile, spent = profile_steps(engine, PROFILED)
    for request in requests:
        engine.abort(request)
    context = load.prompt + load.output // 2
    operations = {name: list(astuple(s)) for name, s in spent.items()}
    return DecodeTimes(steps, first, cpu, wait, profile, step_work(engine, len(prompts), context), operations)
