"""What really went through the layers: an op table that hands every call on and writes down what it saw.

The layer loop has no tracing code. The order of its calls is fixed (see forward.py), so a recorder around the ops
knows which tap each result is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from quantbench.infer.models import block_prefix
from quantbench.infer.ops import FLOAT, Activation, ActSpec, Batch, LayerCache, Ops, Packed
from quantbench.infer.ops.types import Array, Ints, Weights

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tap:
    """What one tap saw. `values` is the float input before quantization (for `k` and `v`: after it, decoded);
    `codes` and `scale` only where it is quantized: f32[1] static, f32[T] per token; for `k` and `v` f32[kv_heads]
    static, f32[T, kv_heads] dynamic."""

    values: F32
    codes: Array | None = None
    scale: F32 | None = None


@dataclass
class Trace:
    """One window of T tokens through every layer."""

    hidden: list[F32] = field(default_factory=list)  # after each block, [T, D]
    # "model.layers.0.attn_in", …, and "lm_head" for the head's input, [T, C]; "….k", "….v" [T, kv_heads, d]
    taps: dict[str, Tap] = field(default_factory=dict)
    logits: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))  # [T, V]

    @staticmethod
    def join(parts: list[Trace]) -> Trace:
        """One trace of consecutive chunks of one window."""
        return Trace(
            [np.concatenate(h) for h in zip(*(p.hidden for p in parts), strict=True)],
            {name: _join([p.taps[name] for p in parts]) for name in parts[0].taps},
            np.concatenate([p.logits for p in parts]),
        )


def _join(taps: list[Tap]) -> Tap:
    values = np.concatenate([t.values for t in taps])
    if taps[0].codes is None or taps[0].scale is None:
        return Tap(values)
    per_token = taps[0].scale.ndim == taps[0].values.ndim - 1 and taps[0].scale.shape[0] == len(taps[0].values)
    scale = np.concatenate([t.scale for t in taps if t.scale is not None]) if per_token else taps[0].scale
    return Tap(values, np.concatenate([t.codes for t in taps if t.codes is not None]), scale)


class Recorder:
    """An op table that records one chunk of one sequence into `trace` on its way through another op table."""

    def __init__(self, ops: Ops, layers: int) -> None:
        self.name = ops.name
        self._layers = layers
        self.trace = Trace()
        self._ops = ops
        self._norms = 0  # calls of add_norm so far: two per layer, one before the head
        self._layer = ""
        self._after_attention = False

    def set_threads(self, threads: int | None) -> int:
        return self._ops.set_threads(threads)

    def pack(self, weight: Weights) -> Packed:
        return self._ops.pack(weight)

    def embed(self, table: Packed, ids: Ints) -> F32:
        return self._ops.embed(table, ids)

    def linear(self, a: Activation, w: Packed) -> F32:
        return self._ops.linear(a, w)

    def add_norm(self, x: F32, delta: F32 | None, weight: F32, eps: float, spec: ActSpec = FLOAT) -> Activation:
        a = self._ops.add_norm(x, delta, weight, eps, replace(spec, keep_float=True))
        layer, half = divmod(self._norms, 2)
        if half == 0 and layer > 0:
            self.trace.hidden.append(x.copy())
        self._norms += 1
        if layer == self._layers:  # the norm before the head
            return self._record("lm_head", a)
        self._layer = block_prefix(layer)
        return self._record(f"{self._layer}.{'mlp_in' if half else 'attn_in'}", a)

    def quantize(self, x: F32, spec: ActSpec) -> Activation:
        a = self._ops.quantize(x, replace(spec, keep_float=True))
        if not self._after_attention:
            return a
        self._after_attention = False
        return self._record(f"{self._layer}.o_in", a)

    def silu_mul(self, gate_up: F32, spec: ActSpec = FLOAT) -> Activation:
        a = self._ops.silu_mul(gate_up, replace(spec, keep_float=True))
        return self._record(f"{self._layer}.down_in", a)

    def rope_write(
        self,
        qkv: F32,
        batch: Batch,
        rope: tuple[F32, F32],
        norms: tuple[F32, F32] | None,
        eps: float,
        cache: LayerCache,
    ) -> F32:
        q = self._ops.rope_write(qkv, batch, rope, norms, eps, cache)
        for tap, pages, scale in (("k", cache.k, cache.k_scale), ("v", cache.v, cache.v_scale)):
            page, offset = np.divmod(batch.slots, pages.shape[2])
            codes = pages[page, :, offset, :]
            if codes.dtype.itemsize > 1:
                self.trace.taps[f"{self._layer}.{tap}"] = Tap(codes.astype(np.float32))
                continue
            own = scale[page, :, offset] if cache.dynamic else scale
            self.trace.taps[f"{self._layer}.{tap}"] = Tap(codes.astype(np.float32) * own[..., None], codes, own)
        return q

    def attention(self, q: F32, batch: Batch, cache: LayerCache, window: int | None = None) -> F32:
        self._after_attention = True
        return self._ops.attention(q, batch, cache, window)

    def _record(self, tap: str, a: Activation) -> Activation:
        assert a.values is not None  # keep_float
        self.trace.taps[tap] = Tap(a.values.copy(), a.codes, a.scale)
        return a
