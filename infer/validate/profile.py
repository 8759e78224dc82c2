"""Where a step's time goes. A native step counts for itself; any other op table is wrapped in one that hands every call
on and keeps the time it took.

What is left of a step after all operations is Python: the scheduler, sampling, and the layer loop of other op tables.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from quantbench.infer.engine import Engine
from quantbench.infer.ops import Ops, Packed
from quantbench.infer.ops.cpu import CpuOps

R = TypeVar("R")
KINDS = {
    "embed": "embedding",
    "add_norm": "norms and quantization",
    "quantize": "norms and quantization",
    "silu_mul": "norms and quantization",
    "rope_write": "attention",
    "attention": "attention",
    "qkv": "linears",
    "o": "linears",
    "gate_up": "linears",
    "down": "linears",
    "head": "output head",
}
OUTSIDE = "Python between the operations"


class Stopwatch:
    """Satisfies `Ops`. `seconds`: kind -> time in its operations, the output head apart from the other linears."""

    def __init__(self, ops: Ops, head: tuple[Packed, ...]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._ops = ops
        self._head = {id(packed) for packed in head}

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        return self._timed(KINDS[name], operation) if name in KINDS else operation

    def linear(self, a: Any, w: Packed) -> Any:
        return self._timed("output head" if id(w) in self._head else "linears", self._ops.linear)(a, w)

    def _timed(self, kind: str, operation: Callable[..., R]) -> Callable[..., R]:
        def run(*arguments: Any, **options: Any) -> R:
            start = time.perf_counter()
            result = operation(*arguments, **options)
            self.seconds[kind] += time.perf_counter() - start
            return result

        return run


@dataclass(frozen=True)
class Spent:
    """One kind of work in one step. Bytes and operations are 0 where only time was taken."""

    seconds: float
    bytes: float = 0.0
    operations: float = 0.0

    def json(self, step: float) -> dict[str, float]:
        """With the share of a step that took `step` seconds."""
        rates = {"gb_per_s": self.bytes / self.seconds / 1e9, "gop_per_s": self.operations / self.seconds / 1e9}
        return {"ms": self.seconds * 1e3, "share": self.seconds / step, **rates}


def profile_steps(engine: Engine, steps: int) -> tuple[dict[str, float], dict[str, Spent]]:
    """The next `steps` steps of the requests that are running: seconds per step by kind of work, which sum to the step,
    and what each operation of a native step spent (empty where steps are not native)."""
    native = isinstance(engine.runner.ops, CpuOps)
    engine.runner.profile(True)
    ops = engine.runner.ops
    watch = Stopwatch(ops, engine.runner.model.head.packed)
    if not native:
        engine.runner.ops = cast(Ops, watch)
    start = time.perf_counter()
    try:
        for _ in range(steps):
            engine.step()
    finally:
        engine.runner.ops = ops
        total = time.perf_counter() - start
        counted = engine.runner.profile(False)
    for name, (seconds, _, _) in counted.items():
        watch.seconds[KINDS[name]] += seconds
    watch.seconds[OUTSIDE] = total - sum(watch.seconds.values())
    spent = {name: Spent(*(value / steps for value in values)) for name, values in counted.items()}
    return {kind: seconds / steps for kind, seconds in watch.seconds.items()}, spent
