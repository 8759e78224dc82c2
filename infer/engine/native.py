"""A whole step in one native call: every block, the final norm and the head, without Python in between.

The layer loop stands twice: in kernels/step.cpp, where it serves, and in forward.py, where it can be read, traced
and run on numpy. Both call the same native operations, and a test holds their logits together bit for bit. Whatever
watches operations (a trace, an op table of another kind) takes the Python loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.infer.engine.forward import Layer, Model, Projection
from quantbench.infer.ops import ActSpec, Batch, LayerCache
from quantbench.infer.ops.cpu import BUFFERS, CACHE_KINDS, FORMATS, CpuOps, load_kernels, native_parts

F32 = npt.NDArray[np.float32]
F32_TYPE = np.dtype(np.float32)
Rope = tuple[F32, F32]


class NativeModel:
    """`model` and its cache pages as one native object. It refers to their arrays: pages are shared, not copied."""

    def __init__(self, ops: CpuOps, model: Model, cache: list[LayerCache]) -> None:
        kernels = load_kernels()
        (embedding,) = native_parts(model.embedding)
        head = _linears(model.head)
        self._step = kernels.Step(ops.kernels, embedding.weight, model.norm, head, model.config.norm_eps)
        for layer, pages in zip(model.layers, cache, strict=True):
            self._step.add_block(*_block(layer), *_pages(pages))
        self._vocabulary = sum(packed.shape[0] for packed in model.head.packed)

    def logits(self, batch: Batch, rope: Rope, rows: npt.NDArray[np.int64]) -> F32 | None:
        """Logits f32[R, V] of `rows` of the batch, whose K and V go into the cache. None where an activation cannot be
        quantized or a logit is not finite: run operation by operation to learn where."""
        logits: F32 = BUFFERS.array((len(rows), self._vocabulary), F32_TYPE)
        fine = self._step.run(
            batch.ids, batch.positions, batch.slots, batch.starts, batch.context, batch.tables, *rope, rows, logits
        )
        return logits if fine else None

    def profile(self, on: bool) -> dict[str, tuple[float, float, float]]:
        """Seconds, bytes read and operations per kind of operation since the last call; counts on from here if `on`."""
        found: dict[str, tuple[float, float, float]] = self._step.profile()
        self._step.set_profiling(on)
        return found


def _spec(spec: ActSpec) -> tuple[int, float | None]:
    return FORMATS[spec.format], spec.scale


def _linears(group: Projection) -> Any:
    linears = load_kernels().Linears(*_spec(group.spec))
    for number, packed in enumerate(group.packed):
        own = group.part_specs[number] if group.part_specs else None
        for part in native_parts(packed):
            linears.add(part.weight, own is not None, *_spec(own or group.spec))
    return linears


def _block(layer: Layer) -> tuple[Any, ...]:
    q_norm, k_norm = layer.qk_norms or (None, None)
    qkv, o, gate_up, down = (_linears(group) for group in (layer.qkv, layer.o, layer.gate_up, layer.down))
    return layer.attn_norm, qkv, q_norm, k_norm, layer.window or 0, o, layer.mlp_norm, gate_up, down


def _pages(cache: LayerCache) -> tuple[Any, ...]:
    kind, bits = CACHE_KINDS[cache.k.dtype]
    return kind, cache.k.view(bits), cache.v.view(bits), cache.k_scale, cache.v_scale
