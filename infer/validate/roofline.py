"""What a step must cost on this machine at least, what it did cost, and the sentence that explains the difference.

Roofline (Williams et al. 2009): a step cannot be faster than its bytes through the measured read bandwidth, nor than
its operations through the measured peak. The larger of the two times is the bound; the share of the ceiling is that
time over the measured one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantbench.infer.engine import Engine

FASTER = 1.05  # below this a variant counts as not faster: runs differ by a few percent
DISTURBED = 0.05
DIGITS = 3  # int8 products in one of a float and an int8 weight (kernels/table.h)
EXPECTED = 0.9  # a speedup below this part of what the ceilings allow is explained


@dataclass(frozen=True)
class Ceilings:
    """Measured peaks of this machine with the threads in use, in 1e9 per second."""

    read_gb_per_s: float
    float32_gop_per_s: float
    int8_gop_per_s: float
    bf16_gop_per_s: float = 0.0  # of instructions made for it; 0: as float32


@dataclass(frozen=True)
class Work:
    """One step: bytes read and operations done. `float_operations` are all that are not int8 × int8; some of them
    multiply bf16 by an instruction of its own, others int8 weights by the three int8 digits of a float."""

    weight_bytes: int
    head_bytes: int  # part of weight_bytes: the output head, and
    cache_bytes: int
    int8_operations: float
    float_operations: float
    bf16_operations: float = 0.0  # part of float_operations
    digit_operations: float = 0.0  # part of float_operations

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def operations(self) -> float:
        return self.int8_operations + self.float_operations

    def memory_s(self, c: Ceilings) -> float:
        return self.bytes / (c.read_gb_per_s * 1e9)

    def compute_s(self, c: Ceilings) -> float:
        bf16 = self.bf16_operations if c.bf16_gop_per_s else 0.0
        floats = self.float_operations - bf16 - self.digit_operations
        seconds = floats / c.float32_gop_per_s + bf16 / (c.bf16_gop_per_s or 1)
        return (seconds + (self.int8_operations + DIGITS * self.digit_operations) / c.int8_gop_per_s) / 1e9


def step_work(engine: Engine, batch: int, context: int) -> Work:
    """Of one decode step of `batch` sequences with `context` tokens each in the cache."""
    weights, head, int8 = _linears(engine)
    total = batch * engine.operations_per_token(context)
    cache = round(batch * engine.bytes_per_token(batch, context)) - weights
    return Work(weights, head, cache, batch * int8, total - batch * int8, *_special(engine, blocks=batch, head=batch))


def prefill_work(engine: Engine, tokens: int) -> Work:
    """Of `tokens` prompt tokens in one pass; the head runs for the last one only."""
    weights, head, int8 = _linears(engine)
    head_operations = sum(2.0 * p.shape[0] * p.shape[1] for p in engine.runner.model.head.packed)
    total = tokens * engine.operations_per_token(tokens // 2) - (tokens - 1) * head_operations
    cache = round(engine.bytes_per_token(1, tokens // 2)) - weights
    return Work(weights, head, cache, tokens * int8, total - tokens * int8, *_special(engine, blocks=tokens, head=1))


def _special(engine: Engine, blocks: int, head: int) -> tuple[float, float]:
    """Operations on bf16, and on floats as digits, of so many tokens through the blocks and through the head."""
    model = engine.runner.model
    groups = [g for layer in model.layers for g in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    counted = [(blocks, p) for group in groups for p in group.packed] + [(head, p) for p in model.head.packed]
    return sum(n * p.bf16_operations for n, p in counted), sum(n * p.digit_operations for n, p in counted)


def _linears(engine: Engine) -> tuple[int, int, float]:
    """Bytes of all linears, bytes of the head, and int8 × int8 operations of one token through the blocks."""
    model = engine.runner.model
    blocks = [g for layer in model.layers for g in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    int8 = 0.0
    for group in blocks:
        specs = group.part_specs or (group.spec,) * len(group.packed)
        int8 += sum(
            2.0 * p.shape[0] * p.shape[1] for p, s in zip(group.packed, specs, strict=True) if s.format == "int8"
        )
    head = sum(p.nbytes for p in model.head.packed)
    return head + sum(p.nbytes for group in blocks for p in group.packed), head, int8


@dataclass(frozen=True)
class Achieved:
    """One step against the ceilings. `cpu_s`: seconds of all threads together."""

    name: str
    seconds: float
    cpu_s: float
    threads: int
    work: Work
    ceilings: Ceilings
    profile: Mapping[str, float] = field(default_factory=dict)  # seconds by kind of work
    disturbed: float = 0.0  # share of the time in which another process held the processor

    @property
    def bound(self) -> str:
        return "memory" if self.work.memory_s(self.ceilings) >= self.work.compute_s(self.ceilings) else "compute"

    @property
    def floor_s(self) -> float:
        """The least time the ceilings allow."""
        return max(self.work.memory_s(self.ceilings), self.work.compute_s(self.ceilings))

    @property
    def share(self) -> float:
        return self.floor_s / self.seconds

    def json(self) -> dict[str, Any]:
        return {
            "gb_per_s": self.work.bytes / self.seconds / 1e9,
            "gop_per_s": self.work.operations / self.seconds / 1e9,
            "share_of_ceiling": self.share,
            "bound": self.bound,
        }


def why(this: Achieved, base: Achieved | None = None, speedup: float | None = None) -> str:
    """One sentence: how near the ceiling the step is, and against `base` where its speed came from or went to.

    `speedup` is the measured one, of pairs; without it that of the two steps is taken.
    """
    parts = [_against_ceiling(this)]
    if base is not None:
        ratio = base.seconds / this.seconds if speedup is None else speedup
        parts.append(_gain(this, base, ratio) if ratio >= FASTER else _no_gain(this, base, ratio))
    if this.disturbed > DISTURBED:
        parts.append(f"other processes held the processor {this.disturbed:.0%} of the time")
    return "; ".join(parts)


def _against_ceiling(a: Achieved) -> str:
    if a.bound == "memory":
        rate = a.work.bytes / a.seconds / 1e9
        return f"reads {a.work.bytes / 1e6:.3g} MB per step at {rate:.3g} GB/s, {a.share:.0%} of the read ceiling"
    rate = a.work.operations / a.seconds / 1e9
    return f"does {a.work.operations / 1e9:.3g} GOP per step at {rate:.3g} GOP/s, {a.share:.0%} of the compute ceiling"


def _gain(this: Achieved, base: Achieved, speedup: float) -> str:
    """Speedup = (least time of the baseline / of this) × (share reached by this / by the baseline)."""
    least = base.floor_s / this.floor_s
    sentence = f"{speedup:.2f}x {base.name}, and the ceilings allow {least:.2f}x"
    if speedup < EXPECTED * least and this.share < EXPECTED * base.share:
        sentence += f": it comes less near to them than {base.name} ({base.share:.0%}){_where(this)}"
    return sentence


def _no_gain(this: Achieved, base: Achieved, speedup: float) -> str:
    start = f"not faster than {base.name} ({speedup:.2f}x) because "
    least = base.floor_s / this.floor_s
    if least < FASTER and this.bound == "memory":
        head = this.work.head_bytes / this.work.bytes
        return (
            start + f"it reads as many bytes ({this.work.bytes / base.work.bytes:.0%}; {head:.0%} are the output head)"
        )
    if least < FASTER:
        return start + "its products take as many float operations: its weights are decoded, not multiplied in int8"
    busy = this.cpu_s / this.seconds
    return start + (
        f"{1 - this.share:.0%} of its step lie outside the {this.bound} ceiling{_where(this)}; "
        f"on average {busy:.1f} of {this.threads} threads are busy"
    )


def _where(a: Achieved) -> str:
    """The three largest shares of the step."""
    total = sum(a.profile.values())
    largest = sorted(a.profile.items(), key=lambda item: -item[1])[:3]
    parts = [f"{kind} {seconds / total * a.seconds * 1e3:.3g}" for kind, seconds in largest]
    return f"; of {a.seconds * 1e3:.3g} ms per step: {', '.join(parts)}" if parts else ""
