"""Where a step's time goes: an op table that hands every call on and keeps the time it took.

What is left of the step after all operations is Python: the scheduler, the layer loop, and sampling.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar, cast

from quantbench.infer.engine import Engine
from quantbench.infer.ops import Ops, Packed

R = TypeVar("R")
KINDS = {
    "embed": "embedding",
    "add_norm": "norms and quantization",
    "quantize": "norms and quantization",
    "silu_mul": "norms and quantization",
    "rope_write": "attention",
    "attention": "attention",
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


def profile_steps(engine: Engine, steps: int) -> dict[str, float]:
    """Seconds per step by kind over the next `steps` steps of the requests that are running; they sum to the step."""
    ops = engine.runner.ops
    watch = Stopwatch(ops, engine.runner.model.head.packed)
    engine.runner.ops = cast(Ops, watch)
    start = time.perf_counter()
    try:
        for _ in range(steps):
            engine.step()
    finally:
        engine.runner.ops = ops
    total = time.perf_counter() - start
    watch.seconds[OUTSIDE] = total - sum(watch.seconds.values())
    return {kind: seconds / steps for kind, seconds in watch.seconds.items()}
