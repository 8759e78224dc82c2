"""Turns linears into what a native weight is packed from: codes of one kind, and scales per output channel and group.

Every granularity becomes [N, G] scales, one for each run of `group_size` inputs of one output channel (G = 1: one per
channel), so kernels know one layout. Neighbours of a fused group that share a kind become one native weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.errors import CheckpointError
from quantbench.infer.ops.types import Array, Floats, Ints, LinearWeightLike

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_KINDS: dict[np.dtype[Any], int] = {  # Kind in kernels/table.h
    np.dtype(np.float32): 0,
    BF16: 1,
    np.dtype(np.float16): 2,
}
CODE_KINDS = {"int8": 3, "int4": 4, "fp8_e4m3": 5}
INT8_DOT = 6  # int8 weights whose input arrives as int8 codes, or as digits that are
MOST_COLUMNS = 65536  # of an INT8_DOT weight: sums of products stay within 32 bits
BLOCK = 128


@dataclass(frozen=True)
class Part:
    """Rows that become one native weight. `codes` are [n, K] each, one below the other; `scale` and `zero` are [N, G],
    None for float weights."""

    names: tuple[str, ...]
    kind: int
    codes: tuple[Array, ...]
    scale: Floats | None
    zero: Ints | None
    group_size: int
    bias: Floats | None
    activations: str | None

    @property
    def rows(self) -> int:
        return sum(int(codes.shape[0]) for codes in self.codes)

    @property
    def columns(self) -> int:
        return int(self.codes[0].shape[1])

    @property
    def is_bf16(self) -> bool:
        """Whether weight and input are one bf16 value each: bf16 itself, or e4m3 codes on both sides."""
        return self.kind == FLOAT_KINDS[BF16] or (self.kind == CODE_KINDS["fp8_e4m3"] and self.activations is not None)

    @property
    def takes_digits(self) -> bool:
        """Whether float inputs are multiplied as three int8 digits each: exact, and faster than as floats."""
        whole = self.scale is not None and self.scale.shape[1] == 1 and self.zero is None
        return whole and self.kind == CODE_KINDS["int8"] and self.activations is None and self.columns <= MOST_COLUMNS

    def native_arguments(self) -> tuple[Any, ...]:
        return (
            INT8_DOT if self.takes_digits else self.kind,
            [_bits(codes) for codes in self.codes],
            self.scale,
            self.zero,
            self.group_size,
            self.bias,
        )

    def joins(self, other: Part) -> bool:
        """Whether `other`'s rows may follow in the same native weight."""
        return (
            (self.kind, self.group_size, self.activations) == (other.kind, other.group_size, other.activations)
            and self.columns == other.columns
            and (self.zero is None) == (other.zero is None)
        )


def parts_of(weights: list[LinearWeightLike]) -> list[Part]:
    """The parts of a fused group, in order. Raises CheckpointError, naming every weight that cannot be run."""
    problems = [p for w in weights for p in _problems(w)]
    if len({_codes(w.weight).shape[1] for w in weights}) > 1:
        problems.append(f"{', '.join(w.name for w in weights)}: fused linears have different numbers of inputs")
    if problems:
        raise CheckpointError(*problems)
    parts: list[Part] = []
    for part in map(_part, weights):
        if parts and parts[-1].joins(part):
            parts[-1] = _concatenate(parts[-1], part)
        else:
            parts.append(part)
    return parts


def _problems(w: LinearWeightLike) -> list[str]:
    weight = w.weight
    if isinstance(weight, np.ndarray):
        if weight.dtype not in FLOAT_KINDS:
            return [f"{w.name}: weight dtype {weight.dtype} cannot be run; allowed: float32, bfloat16, float16"]
        return []
    if weight.format not in CODE_KINDS:
        return [f"{w.name}: weight format {weight.format!r} cannot be run; allowed: {', '.join(CODE_KINDS)}"]
    if not np.all(np.isfinite(weight.scale)):
        return [f"{w.name}: its weight scale holds a NaN or an infinity; export the checkpoint again"]
    if weight.format == "fp8_e4m3" and np.any((weight.codes.view(np.uint8) & 0x7F) == 0x7F):
        return [f"{w.name}: its e4m3 weight holds NaN codes; export the checkpoint again"]
    return []


def _codes(weight: Any) -> Array:
    codes: Array = weight if isinstance(weight, np.ndarray) else weight.codes
    return codes


def _bits(codes: Array) -> Array:
    if codes.dtype == np.int8:
        return codes
    return codes.view({2: np.uint16, 1: np.uint8, 4: np.float32}[codes.dtype.itemsize])


def _part(w: LinearWeightLike) -> Part:
    weight = w.weight
    bias = None if w.bias is None else np.ascontiguousarray(w.bias, np.float32)
    codes = np.ascontiguousarray(_codes(weight))
    if isinstance(weight, np.ndarray):
        return Part((w.name,), FLOAT_KINDS[codes.dtype], (codes,), None, None, codes.shape[1], bias, None)
    columns = codes.shape[1]
    group: int = columns
    if weight.granularity in ("group", "block"):
        group = int(weight.group_size or columns) if weight.granularity == "group" else BLOCK
    scale = per_group(weight.scale, weight.granularity, codes.shape[0]).astype(np.float32)
    zero = None if weight.zero is None else per_group(weight.zero, weight.granularity, codes.shape[0]).astype(np.int32)
    kind = CODE_KINDS[weight.format]
    if weight.format == "int8" and w.activations == "int8" and scale.shape[1] == 1 and zero is None:
        kind = INT8_DOT
    return Part((w.name,), kind, (codes,), scale, zero, group, bias, w.activations)


def per_group(values: Array, granularity: str, rows: int) -> Array:
    """A scale or zero of any granularity as [rows, G]."""
    if granularity == "block":
        values = np.repeat(values, BLOCK, axis=0)[:rows]
    matrix = np.asarray(values).reshape(1 if granularity == "tensor" else rows, -1)
    return np.ascontiguousarray(np.broadcast_to(matrix, (rows, matrix.shape[1])))


def _concatenate(a: Part, b: Part) -> Part:
    bias = None
    if a.bias is not None or b.bias is not None:
        zeros = (np.zeros(p.rows, np.float32) if p.bias is None else p.bias for p in (a, b))
        bias = np.concatenate(list(zeros))
    return replace(
        a,
        names=a.names + b.names,
        codes=a.codes + b.codes,
        scale=None if a.scale is None or b.scale is None else np.concatenate([a.scale, b.scale]),
        zero=None if a.zero is None or b.zero is None else np.concatenate([a.zero, b.zero]),
        bias=bias,
    )
