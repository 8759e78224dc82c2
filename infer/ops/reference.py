"""Every operation in plain numpy: the specification that native kernels are compared with. Slow, and meant to be.

Arithmetic that decides codes (scales, divisions, rounding) is float32 exactly as written; sums that a kernel may
order differently (norms, dot products, softmax) are float64, so the reference is the better side of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from quantbench.errors import DependencyError
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
    LinearWeightLike,
    Packed,
    Weights,
)
from quantbench.quantizers.activation import quantize_activation, quantize_heads
from quantbench.quantizers.formats import E4M3, FORMATS
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ReferencePacked(Packed):
    """The weights as they came; rows of several are concatenated in `linear`."""

    weights: tuple[LinearWeightLike, ...] = ()


def as_list(weight: Weights) -> list[LinearWeightLike]:
    return list(weight) if isinstance(weight, Sequence) else [weight]


def quantize(x: Floats, spec: ActSpec) -> Activation:
    """`x` as `spec` says. A token of zeros has scale 1. Raises CalibrationError where x is NaN or infinite."""
    if spec.format is None:
        return Activation(values=x)
    codes, scale = quantize_activation(x, spec.format, spec.scale)
    return Activation(x if spec.keep_float else None, codes, scale, spec.format)


def dequantized(weight: Array | QuantizedWeight) -> Floats:
    """(codes - zero) * scale in float32, or the float weight itself."""
    return weight.astype(np.float32) if isinstance(weight, np.ndarray) else dequantize_weight(weight)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) * weight over the last axis; the mean in float64, the products in float32."""
    mean = np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True)
    inverse = (1.0 / np.sqrt(mean + eps)).astype(np.float32)
    normed: Floats = x * inverse * weight
    return normed


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """RoPE with the halves of a head as pairs: x [T, heads, d], cos and sin [T, d/2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def store(pages: Array, slots: Array, heads: Floats, scale: Floats) -> None:
    """Write [T, kv_heads, d] into [pages, kv_heads, 64, d], quantized where the cache is: under each head's static
    scale, or under one per token and head, which is written too. Raises CalibrationError where that would be NaN."""
    format = {np.dtype(np.int8): "int8", E4M3: "fp8_e4m3"}.get(pages.dtype)
    page, offset = np.divmod(slots, PAGE)
    if format is None:
        pages[page, :, offset] = heads.astype(pages.dtype)
    elif scale.ndim == 3:
        pages[page, :, offset], scale[page, :, offset] = quantize_heads(heads, format)
    else:
        pages[page, :, offset] = FORMATS[format].encode(heads, scale[None, :, None])


def attend(q: Floats, keys: Floats, values: Floats, first: int, window: int | None) -> Floats:
    """One sequence: q [T, H, d] at positions first.., keys and values [context, KV, d]."""
    tokens, heads, size = q.shape
    group = heads // keys.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (keys, values))
    scores = np.einsum("thd,chd->htc", q.astype(np.float64), k) / np.sqrt(size)
    position = first + np.arange(tokens)[:, None]
    column = np.arange(keys.shape[0])[None, :]
    hidden = (column > position) | ((column <= position - window) if window else False)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Floats = np.einsum("htc,chd->thd", weights, v).astype(np.float32)
    return out


class ReferenceOps:
    """The reference column of the op table; see `types.Ops` for shapes."""

    name = "reference"

    def set_threads(self, threads: int | None) -> int:
        """numpy's own affair; results do not depend on it."""
        return threads or 1

    def pack(self, weight: Weights) -> ReferencePacked:
        weights = as_list(weight)
        codes = [w.weight if isinstance(w.weight, np.ndarray) else w.weight.codes for w in weights]
        shape = (sum(c.shape[0] for c in codes), codes[0].shape[1])
        return ReferencePacked(tuple(w.name for w in weights), shape, sum(c.nbytes for c in codes), tuple(weights))

    def embed(self, table: Packed, ids: Ints) -> Floats:
        return np.asarray(_weights(table)[0].weight[ids], dtype=np.float32)

    def add_norm(
        self, x: Floats, delta: Floats | None, weight: Floats, eps: float, spec: ActSpec = FLOAT
    ) -> Activation:
        if delta is not None:
            x += delta
        return quantize(rms_norm(x, weight, eps), spec)

    def linear(self, a: Activation, w: Packed) -> Floats:
        return np.concatenate([_linear(a, part) for part in _weights(w)], axis=1)

    def quantize(self, x: Floats, spec: ActSpec) -> Activation:
        return quantize(x, spec)

    def silu_mul(self, gate_up: Floats, spec: ActSpec = FLOAT) -> Activation:
        gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite, and the quotient then is the zero it should be
            silu = gate / (1 + np.exp(-gate))
        return quantize((silu * up).astype(np.float32), spec)

    def rope_write(
        self,
        qkv: Floats,
        batch: Batch,
        rope: tuple[Floats, Floats],
        norms: tuple[Floats, Floats] | None,
        eps: float,
        cache: LayerCache,
    ) -> Floats:
        kv_heads, size = cache.k.shape[1], cache.k.shape[3]
        heads = qkv.shape[1] // size - 2 * kv_heads
        q, k, v = np.split(qkv.reshape(len(qkv), -1, size), [heads, heads + kv_heads], axis=1)
        if norms is not None:
            q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
        cos, sin = rope[0][batch.positions], rope[1][batch.positions]
        store(cache.k, batch.slots, rotate(k, cos, sin), cache.k_scale)
        store(cache.v, batch.slots, v, cache.v_scale)
        return rotate(q, cos, sin).reshape(len(qkv), heads * size)

    def attention(self, q: Floats, batch: Batch, cache: LayerCache, window: int | None = None) -> Floats:
        size = cache.k.shape[3]
        out = np.empty_like(q)
        for s, context in enumerate(batch.context):
            rows = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
            pages = batch.tables[s, : -(-int(context) // PAGE)]
            sides = ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
            k, v = (_gather(side, scale, pages, int(context)) for side, scale in sides)
            heads = q[rows].reshape(rows.stop - rows.start, -1, size)
            first = int(context) - len(heads)
            out[rows] = attend(heads, k, v, first, window).reshape(len(heads), -1)
        return out


def _weights(packed: Packed) -> tuple[LinearWeightLike, ...]:
    if not isinstance(packed, ReferencePacked):
        raise DependencyError(
            f"{', '.join(packed.names)}: packed by another backend; pack weights with the same Ops that uses them"
        )
    return packed.weights


def _gather(pages: Array, scale: Floats, table: Array, context: int) -> Floats:
    """[pages, KV, 64, d] -> f32[context, KV, d] of one sequence, as its codes read under their scales."""
    blocks = pages[table].astype(np.float32) * (scale[table] if scale.ndim == 3 else scale[:, None])[..., None]
    return blocks.transpose(0, 2, 1, 3).reshape(-1, *blocks.shape[1::2])[:context]


def _linear(a: Activation, w: LinearWeightLike) -> Floats:
    weight = w.weight
    # a linear whose input stays float reads the floats, where both were handed on
    if a.codes is None or (a.values is not None and w.activations is None):
        assert a.values is not None
        values = a.values
        if isinstance(weight, np.ndarray) and weight.dtype == BF16:
            values = values.astype(BF16)  # bf16 weights multiply bf16 inputs; the sums are float
        product = (values.astype(np.float64) @ dequantized(weight).astype(np.float64).T).astype(np.float32)
    else:
        assert a.scale is not None
        integer = a.format == "int8" and not isinstance(weight, np.ndarray) and weight.format == "int8"
        matrix = weight.codes if integer else dequantized(weight)
        # float64 holds every sum of int8 products exactly (below 2**53)
        total = (a.codes.astype(np.float64) @ matrix.astype(np.float64).T).astype(np.float32)
        scale = weight.scale.reshape(1, -1) if integer else np.float32(1)
        product = total * (a.scale[:, None] * scale)
    bias = np.float32(0) if w.bias is None else w.bias.astype(np.float32)
    y: Floats = product + bias
    return y
