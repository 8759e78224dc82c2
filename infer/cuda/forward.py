"""The layer loop on device arrays: engine/forward.py's ten operations, nothing of which visits the host.

Also what a model needs for that: its norms and RoPE tables uploaded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from quantbench.infer.cuda import attention, gemm, rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.ops import on_device, packed, project
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.engine.forward import Layer, Model, Projection
from quantbench.infer.ops.types import Activation, ActSpec, Floats

F32 = npt.NDArray[np.float32]
Rope = tuple[DeviceArray, DeviceArray]
Watch = Callable[[int, DeviceArray, DeviceArray], None]  # layer, stream, its last delta


@dataclass(frozen=True)
class DeviceLayer:
    """`engine.forward.Layer` with its norms on the device."""

    layer: Layer
    attn_norm: DeviceArray
    mlp_norm: DeviceArray
    qk_norms: tuple[DeviceArray, DeviceArray] | None


@dataclass(frozen=True)
class DeviceModel:
    """A model packed by `CudaOps`, its norms uploaded."""

    model: Model
    embedding: DeviceWeight
    layers: tuple[DeviceLayer, ...]
    norm: DeviceArray

    @classmethod
    def upload(cls, device: Device, model: Model) -> DeviceModel:
        def place(layer: Layer) -> DeviceLayer:
            norms = layer.qk_norms and (device.upload(layer.qk_norms[0]), device.upload(layer.qk_norms[1]))
            return DeviceLayer(layer, device.upload(layer.attn_norm), device.upload(layer.mlp_norm), norms)

        embedding = packed(model.embedding).weights[0]
        return cls(model, embedding, tuple(map(place, model.layers)), device.upload(model.norm))


def run_layers(
    device: Device,
    model: DeviceModel,
    batch: DeviceBatch,
    rope: Rope,
    cache: list[DeviceCache],
    watch: Watch | None = None,
) -> tuple[DeviceArray, DeviceArray | None]:
    """The residual stream f32[T, D] before the last block's output, and that output."""
    eps = model.model.config.norm_eps
    x = rows.embed(device, model.embedding, batch.ids)
    delta: DeviceArray | None = None
    for number, (held, pages) in enumerate(zip(model.layers, cache, strict=True)):
        layer = held.layer
        device.section = "qkv"
        a = rows.add_norm(device, x, delta, held.attn_norm, eps, layer.qkv.spec)
        qkv = linears(device, a, layer.qkv)
        device.section = "attention"
        a = _attend(device, qkv, batch, rope, held, eps, pages)
        device.section = "o"
        delta = linears(device, a, layer.o)
        device.section = "gate_up"
        a = rows.add_norm(device, x, delta, held.mlp_norm, eps, layer.gate_up.spec)
        a = swiglu(device, a, layer.gate_up, layer.down.spec)
        device.section = "down"
        delta = linears(device, a, layer.down)
        if watch is not None:
            watch(number, x, delta)
    return x, delta


def logits_of(
    device: Device, model: DeviceModel, x: DeviceArray, delta: DeviceArray | None, wanted: DeviceArray | None = None
) -> DeviceArray:
    """Logits f32[R, V] of the rows `wanted` (i32[R] on the device; None: all)."""
    if wanted is not None:
        x = rows.gather(device, x, wanted)
        delta = None if delta is None else rows.gather(device, delta, wanted)
    head = model.model.head
    device.section = "head"
    a = rows.add_norm(device, x, delta, model.norm, model.model.config.norm_eps, head.spec)
    return linears(device, a, head, np.dtype(np.float32))


def _attend(
    device: Device,
    qkv: DeviceArray,
    batch: DeviceBatch,
    rope: Rope,
    held: DeviceLayer,
    eps: float,
    pages: DeviceCache,
) -> Activation:
    """RoPE, K and V into the pages, attention, and its output as o's linear takes it."""
    window, spec = held.layer.window, held.layer.o.spec
    if attention.fuses_decode(device, batch, pages):
        return attention.decode_attention(device, qkv, batch, rope, held.qk_norms, eps, pages, window, spec)
    q = rows.rope_write(device, qkv, batch, rope, held.qk_norms, eps, pages)
    return quantize(device, attention.attention(device, q, batch, pages, window), spec)


def quantize(device: Device, x: DeviceArray, spec: ActSpec) -> Activation:
    if spec.format is None:
        return Activation(values=cast(Floats, x))
    return rows.quantize(device, x, spec)


def linears(device: Device, a: Activation, group: Projection, dtype: np.dtype[np.generic] | None = None) -> DeviceArray:
    """All linears of a group side by side, in `dtype` (the device's own where it is left out)."""
    width = sum(part.shape[0] for part in group.packed)
    out = device.empty((a.tokens, width), dtype or device.dtype)
    if len(group.packed) == 1:
        project(device, a, packed(group.packed[0]), out)
        return out
    column = 0
    for i, part in enumerate(group.packed):
        own = bool(group.part_specs) and a.values is not None
        source = quantize(device, on_device(a.values), group.part_specs[i]) if own else a
        for weight in packed(part).weights:
            gemm.linear(device, source, weight, out, column)
            column += weight.rows
    return out


def swiglu(device: Device, a: Activation, group: Projection, spec: ActSpec) -> Activation:
    """gate and up, and silu(gate) * up as `spec` says: by one kernel where that is the faster way."""
    weights = packed(group.packed[0]).weights if len(group.packed) == 1 else ()
    if len(weights) == 1 and gemm.fuses_swiglu(device, weights[0], a.tokens, spec):
        return gemm.linear_swiglu(device, a, weights[0], spec)
    return rows.silu_mul(device, linears(device, a, group), spec)
