"""The native column of the op table: thin calls into quantbench._kernels, with outputs allocated here.

Nothing is converted on the way: arrays must be C-contiguous and of the exact dtype, which the extension checks. numpy's
extension dtypes (bf16, e4m3) cross as views of their bits, beside a number that says what the bits are.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from quantbench.errors import CalibrationError, DependencyError, RequestError
from quantbench.infer.ops.buffers import Buffers
from quantbench.infer.ops.pack import Part, parts_of
from quantbench.infer.ops.types import (
    FLOAT,
    Activation,
    ActSpec,
    Array,
    Batch,
    Floats,
    Ints,
    LayerCache,
    Packed,
    Weights,
)

if TYPE_CHECKING:
    from types import ModuleType

BUFFERS = Buffers()
F32 = np.dtype(np.float32)  # objects made once: a step of one token makes some hundred small arrays
INT8 = np.dtype(np.int8)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FORMATS: dict[str | None, int] = {None: 0, "int8": 1, "fp8_e4m3": 2}  # Quant in kernels/table.h
CACHE_KINDS: dict[np.dtype[Any], tuple[int, Any]] = {  # CacheKind, and the dtype whose view crosses
    np.dtype(np.float32): (0, np.float32),
    np.dtype(ml_dtypes.bfloat16): (1, np.uint16),
    np.dtype(np.float16): (2, np.uint16),
    np.dtype(np.int8): (3, np.int8),
    E4M3: (4, np.uint8),
}


def load_kernels() -> ModuleType:
    """The compiled extension. Raises DependencyError where it was not built."""
    try:
        return importlib.import_module("quantbench._kernels")
    except ImportError as error:
        raise DependencyError(
            f"the native kernels quantbench._kernels cannot be loaded ({error}). Build them with "
            "`pip install .`, or use the numpy reference (slow) with ops='reference'"
        ) from error


def available_isas() -> list[str]:
    """Instruction sets of this processor that kernels exist for, best last."""
    return list(load_kernels().available())


def explain_isa(isa: str | None = None) -> str:
    """One line per instruction set, worst first: whether it is in use, could be, or what the processor lacks for it."""
    wanted = isa or os.environ.get("QUANTBENCH_ISA", "")
    lines = []
    for name, missing, chosen in load_kernels().explain(None, wanted):
        said = f"this processor lacks {', '.join(missing)}" if missing else "in use" if chosen else "could be used"
        lines.append(f"{name}: {said}")
    return "\n".join(lines)


def set_threads(threads: int | None) -> int:
    """Threads of the process's pool; None = processors of its affinity. Raises RequestError outside 1..1024."""
    kernels = load_kernels()
    count = int(kernels.processors()) if threads is None else threads
    if not 1 <= count <= 1024:
        raise RequestError(f"threads must be between 1 and 1024, not {count}; leave it out for one per processor")
    if kernels.threads() != count:
        kernels.set_threads(count)
    return count


@dataclass(frozen=True)
class NativePart:
    """A native weight. The arrays it was packed from are not kept: weights are in memory once."""

    rows: int
    activations: str | None
    weight: Any  # quantbench._kernels.PackedWeight
    bf16: bool = False  # multiplied by the instruction for bf16
    digits: bool = False  # float inputs are multiplied as int8 digits


@dataclass(frozen=True)
class CpuPacked(Packed):
    parts: tuple[NativePart, ...] = ()

    @property
    def bf16_operations(self) -> float:
        return sum(2.0 * part.rows * self.shape[1] for part in self.parts if part.bf16)

    @property
    def digit_operations(self) -> float:
        return sum(2.0 * part.rows * self.shape[1] for part in self.parts if part.digits)


class CpuOps:
    """The native column; see `types.Ops` for shapes. `isa` is the instruction set in use."""

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        """`isa`, else QUANTBENCH_ISA, else the best. Raises DependencyError for one this processor lacks."""
        self._module = load_kernels()
        wanted = isa or os.environ.get("QUANTBENCH_ISA", "")
        if wanted and wanted not in self._module.available():
            raise DependencyError(
                f"instruction set {wanted!r} (QUANTBENCH_ISA) is not one this processor has kernels for. "
                f"It has: {', '.join(self._module.available())}. Leave QUANTBENCH_ISA unset for the best"
            )
        self.kernels = self._module.Kernels(wanted)
        self.isa: str = self.kernels.isa

    def set_threads(self, threads: int | None) -> int:
        return set_threads(threads)

    @property
    def threads(self) -> int:
        """Of the process's pool."""
        return int(self._module.threads())

    def pack(self, weight: Weights) -> CpuPacked:
        parts = parts_of(list(weight) if isinstance(weight, Sequence) else [weight])
        natives = tuple(
            NativePart(
                p.rows,
                p.activations,
                self._module.pack(*p.native_arguments()),
                self._multiplies_bf16(p),
                p.takes_digits,
            )
            for p in parts
        )
        names = tuple(name for part in parts for name in part.names)
        shape = (sum(part.rows for part in parts), parts[0].columns)
        return CpuPacked(names, shape, sum(n.weight.nbytes for n in natives), natives)

    def _multiplies_bf16(self, part: Part) -> bool:
        """Whether an instruction of its own does: for bf16 weights, and without tiles for e4m3 codes on both sides."""
        return self.isa in ("avx512bf16", "amx") and part.is_bf16 and (self.isa != "amx" or part.scale is None)

    def embed(self, table: Packed, ids: Ints) -> Floats:
        out = BUFFERS.array((len(ids), table.shape[1]), F32)
        self.kernels.embed(native_parts(table)[0].weight, ids, out)
        return out

    def add_norm(
        self, x: Floats, delta: Floats | None, weight: Floats, eps: float, spec: ActSpec = FLOAT
    ) -> Activation:
        a = _output(x.shape[0], x.shape[1], spec)
        return _finite(
            self.kernels.add_norm(x, delta, weight, eps, a.values, FORMATS[spec.format], spec.scale, *_codes(a)), a
        )

    def linear(self, a: Activation, w: Packed) -> Floats:
        y = BUFFERS.array((a.tokens, w.shape[0]), F32)
        values, codes, format = a.values, _bits(a.codes), FORMATS[a.format]
        column = 0
        for part in native_parts(w):
            # a part whose input stays float reads the floats, where both were handed on
            floats = values is not None and (codes is None or part.activations is None)
            if floats:
                self.kernels.linear(part.weight, values, None, 0, None, y, column)
            else:
                self.kernels.linear(part.weight, None, codes, format, a.scale, y, column)
            column += part.rows
        return y

    def multiply(self, x: Floats, w: Packed, y: Floats) -> None:
        """y [T, N] = x [T, K] wT of float x: `linear` into the caller's array, for several threads at once."""
        column = 0
        for part in native_parts(w):
            self.kernels.linear(part.weight, x, None, 0, None, y, column)
            column += part.rows

    def quantize(self, x: Floats, spec: ActSpec) -> Activation:
        if spec.format is None:
            return Activation(values=x)
        a = _output(x.shape[0], x.shape[1], spec)
        a.values = x if spec.keep_float else None
        return _finite(self.kernels.quantize(x, FORMATS[spec.format], spec.scale, *_codes(a)), a)

    def silu_mul(self, gate_up: Floats, spec: ActSpec = FLOAT) -> Activation:
        a = _output(gate_up.shape[0], gate_up.shape[1] // 2, spec)
        return _finite(self.kernels.silu_mul(gate_up, a.values, FORMATS[spec.format], spec.scale, *_codes(a)), a)

    def rope_write(
        self,
        qkv: Floats,
        batch: Batch,
        rope: tuple[Floats, Floats],
        norms: tuple[Floats, Floats] | None,
        eps: float,
        cache: LayerCache,
    ) -> Floats:
        kind, bits = CACHE_KINDS[cache.k.dtype]
        kv_heads, size = cache.k.shape[1], cache.k.shape[3]
        q = BUFFERS.array((qkv.shape[0], qkv.shape[1] - 2 * kv_heads * size), F32)
        q_norm, k_norm = norms or (None, None)
        self.kernels.rope_write(
            qkv, batch.positions, batch.slots, rope[0], rope[1], q_norm, k_norm, eps,
            kind, cache.k.view(bits), cache.v.view(bits), cache.k_scale, cache.v_scale, q,
        )  # fmt: skip
        return q

    def attention(self, q: Floats, batch: Batch, cache: LayerCache, window: int | None = None) -> Floats:
        kind, bits = CACHE_KINDS[cache.k.dtype]
        out = BUFFERS.array(q.shape, F32)
        self.kernels.attention(
            q, batch.starts, batch.context, batch.tables,
            kind, cache.k.view(bits), cache.v.view(bits), cache.k_scale, cache.v_scale, window or 0, out,
        )  # fmt: skip
        return out


def native_parts(packed: Packed) -> tuple[NativePart, ...]:
    """The native weights of `packed`. Raises DependencyError where another backend packed it."""
    if not isinstance(packed, CpuPacked):
        raise DependencyError(
            f"{', '.join(packed.names)}: packed by another backend; pack weights with the same Ops that uses them"
        )
    return packed.parts


def _output(tokens: int, width: int, spec: ActSpec) -> Activation:
    """Room for what `spec` asks for."""
    values = BUFFERS.array((tokens, width), F32) if spec.format is None or spec.keep_float else None
    if spec.format is None:
        return Activation(values)
    codes = BUFFERS.array((tokens, width), INT8 if spec.format == "int8" else E4M3)
    return Activation(values, codes, np.empty(tokens if spec.scale is None else 1, F32), spec.format)


def _bits(codes: Array | None) -> Array | None:
    return codes.view(np.uint8) if codes is not None and codes.dtype is not INT8 else codes


def _codes(a: Activation) -> tuple[Array | None, Floats | None]:
    return _bits(a.codes), a.scale


def _finite(row: int, a: Activation) -> Activation:
    """`a`, unless the kernel met a NaN or an infinity in `row`, which no scale can hold."""
    if row >= 0:
        raise CalibrationError(
            f"activation: row {row} of {a.tokens} has a NaN or an infinity; only finite values can be quantized: "
            "a weight or scale of the layers before it is damaged, run `quantbench lint` on the model"
        )
    return a
