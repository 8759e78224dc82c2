"""The CUDA column of the op table, and what it is made of.

    array.py, arena.py   device arrays, and the memory of a step
    compile.py           CUDA C++ to a cubin by NVRTC, cached by source, flags and architecture
    device.py            context, stream, memory, kernels, launches, graphs
    gemm.py              pack(device, part); linear(device, a, w, …): every kind of weight
    rows.py              one row at a time: norms, quantization, SwiGLU, RoPE, embedding, sampling
    attention.py         attention over the pages as stored
    forward.py           the layer loop on device arrays
    runner.py            the engine's Runner: pages on the device, decode steps as graphs
    kernels/             *.cu and *.cuh; no CUDA header is included, so NVRTC needs none

`CudaOps` takes and returns host arrays, as every column does: that is how traces and tests see each operation. The
engine's steps do not go through it: `runner.py` keeps everything on the device.

Dtypes: the residual stream is f32. What passes between operations (qkv, q, attention's output, gate_up, delta, an
activation's `values`) is `device.dtype`: float32, which follows the CPU runtime's arithmetic, or bfloat16 or float16,
which are faster where activations are large. Codes are int8 or e4m3 with f32 scales, logits are f32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from quantbench.errors import CalibrationError, DependencyError
from quantbench.infer.cuda import attention, gemm, layout, rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.weight import CudaPacked
from quantbench.infer.ops.pack import parts_of
from quantbench.infer.ops.types import (
    FLOAT,
    PAGE,
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


@dataclass(frozen=True)
class Borrowed:
    """The pages of a host cache that one operation touches, copied to the device and numbered from 0."""

    cache: DeviceCache
    pages: npt.NDArray[np.int64]  # their numbers on the host


class CudaOps:
    """The CUDA column; see `types.Ops` for shapes."""

    name = "cuda"

    def __init__(self, dtype: str | None = None) -> None:
        """`dtype`, else QUANTBENCH_CUDA_DTYPE, else float32: what is held between operations. Raises as `Device`."""
        self.device = Device(dtype or os.environ.get("QUANTBENCH_CUDA_DTYPE", "float32"))

    def set_threads(self, threads: int | None) -> int:
        """The GPU's own affair."""
        return threads or 1

    def pack(self, weight: Weights) -> CudaPacked:
        parts = parts_of(list(weight) if isinstance(weight, Sequence) else [weight])
        weights = tuple(layout.pack(self.device, part) for part in parts)
        names = tuple(name for part in parts for name in part.names)
        shape = (sum(part.rows for part in parts), parts[0].columns)
        return CudaPacked(names, shape, sum(w.nbytes for w in weights), weights)

    def embed(self, table: Packed, ids: Ints) -> Floats:
        return self._host(rows.embed(self.device, packed(table).weights[0], self._lend(ids)))

    def add_norm(
        self, x: Floats, delta: Floats | None, weight: Floats, eps: float, spec: ActSpec = FLOAT
    ) -> Activation:
        stream = self._lend(x)
        added = None if delta is None else self._floats(delta)
        a = self._activation(rows.add_norm(self.device, stream, added, self._lend(weight), eps, spec))
        x[...] = self.device.fetch(stream)
        return a

    def linear(self, a: Activation, w: Packed) -> Floats:
        out = self.device.empty((a.tokens, w.shape[0]), np.float32)
        lent = Activation(
            None if a.values is None else cast(Floats, self._floats(a.values)),
            None if a.codes is None else cast(Array, self._lend(a.codes)),
            None if a.scale is None else cast(Floats, self._lend(a.scale)),
            a.format,
        )
        project(self.device, lent, packed(w), out)
        return self._host(out)

    def quantize(self, x: Floats, spec: ActSpec) -> Activation:
        if spec.format is None:
            return Activation(values=x)
        a = self._activation(rows.quantize(self.device, self._floats(x), spec))
        a.values = x if spec.keep_float else None
        return a

    def silu_mul(self, gate_up: Floats, spec: ActSpec = FLOAT) -> Activation:
        return self._activation(rows.silu_mul(self.device, self._floats(gate_up), spec))

    def rope_write(
        self,
        qkv: Floats,
        batch: Batch,
        rope: tuple[Floats, Floats],
        norms: tuple[Floats, Floats] | None,
        eps: float,
        cache: LayerCache,
    ) -> Floats:
        borrowed = self._borrow(cache, batch.slots // PAGE)
        tables = (self._lend(rope[0]), self._lend(rope[1]))
        weights = None if norms is None else (self._lend(norms[0]), self._lend(norms[1]))
        lent = self._batch(batch, borrowed)
        q = rows.rope_write(self.device, self._floats(qkv), lent, tables, weights, eps, borrowed.cache)
        for ours, theirs in zip(cache.arrays, borrowed.cache.arrays, strict=True):
            ours[borrowed.pages] = self.device.fetch(theirs)
        return self._host(q)

    def attention(self, q: Floats, batch: Batch, cache: LayerCache, window: int | None = None) -> Floats:
        used = [t[: -(-int(n) // PAGE)] for t, n in zip(batch.tables, batch.context, strict=True)]
        borrowed = self._borrow(cache, np.concatenate(used))
        out = attention.attention(self.device, self._floats(q), self._batch(batch, borrowed), borrowed.cache, window)
        return self._host(out)

    def _lend(self, array: npt.NDArray[Any]) -> DeviceArray:
        """A copy on the device, in a step's memory."""
        out = self.device.empty(array.shape, array.dtype)
        self.device.write(out, array)
        return out

    def _floats(self, array: npt.NDArray[Any]) -> DeviceArray:
        return self._lend(array.astype(self.device.dtype))

    def _host(self, array: DeviceArray) -> Floats:
        return self.device.fetch(array).astype(np.float32)

    def _activation(self, a: Activation) -> Activation:
        """An activation on the host. Raises CalibrationError where the kernel met a NaN or an infinity."""
        fetched = [None if part is None else self.device.fetch(on_device(part)) for part in (a.codes, a.scale)]
        values = None if a.values is None else self._host(on_device(a.values))
        if a.format is not None and self.device.fetch(self.device.bad)[0]:
            self.device.fill(self.device.bad, 0)
            raise CalibrationError(
                f"activation: one of {a.tokens} rows has a NaN or an infinity; only finite values can be quantized: "
                "a weight or scale of the layers before it is damaged, run `quantbench lint` on the model"
            )
        return Activation(values, fetched[0], fetched[1], a.format)

    def _borrow(self, cache: LayerCache, used: npt.NDArray[Any]) -> Borrowed:
        pages = np.unique(used).astype(np.int64)
        paged = [self._lend(array[pages]) for array in cache.arrays]
        static = [] if cache.dynamic else [self._lend(cache.k_scale), self._lend(cache.v_scale)]
        return Borrowed(DeviceCache(*paged, *static), pages)

    def _batch(self, batch: Batch, borrowed: Borrowed) -> DeviceBatch:
        """`batch` with the page numbers of `borrowed`."""
        tables = np.searchsorted(borrowed.pages, batch.tables).astype(np.int32)
        slots = np.searchsorted(borrowed.pages, batch.slots // PAGE) * PAGE + batch.slots % PAGE
        lengths = np.diff(batch.starts)
        return DeviceBatch(
            ids=self._lend(batch.ids),
            positions=self._lend(batch.positions),
            slots=self._lend(slots.astype(np.int64)),
            starts=self._lend(batch.starts),
            context=self._lend(batch.context),
            tables=self._lend(tables),
            decode=bool((lengths == 1).all()),
            max_context=int(batch.context.max()),
            max_rows=int(lengths.max()),
            lengths=lengths,
            contexts=batch.context,
        )


def packed(weight: Packed) -> CudaPacked:
    """`weight` as this backend made it. Raises DependencyError for another backend's."""
    if not isinstance(weight, CudaPacked):
        raise DependencyError(
            f"{', '.join(weight.names)}: packed by another backend; pack weights with the same Ops that uses them"
        )
    return weight


def on_device(array: object) -> DeviceArray:
    """An activation's array where it is known to lie on the device: `Activation` is typed for host arrays."""
    assert isinstance(array, DeviceArray)
    return array


def project(device: Device, a: Activation, group: CudaPacked, out: DeviceArray) -> None:
    """All linears of a packed group into the columns of `out`, one after the other."""
    column = 0
    for weight in group.weights:
        gemm.linear(device, a, weight, out, column)
        column += weight.rows
