"""The layer loop: everything a decoder does, as ten calls of the op table per layer.

    add_norm → qkv → rope_write → attention → quantize → o → add_norm → gate_up → silu_mul → down

`x` is the residual stream. A block's output `delta` is added to it by the next `add_norm`, which also normalizes
and quantizes, so the stream is read and written once per half block. Rows of all sequences, prompt chunks and single
decode tokens alike, are stacked into one batch: only `rope_write` and `attention` know where a sequence begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantbench.errors import CalibrationError, CheckpointError
from quantbench.infer.models import ModelConfig, block_prefix
from quantbench.infer.ops import PAGE, Activation, ActSpec, Batch, LayerCache, Ops, Packed

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Projection:
    """The linears that share one input. `spec` is what the op before them makes of that input.

    Normally one packed weight. Linears that are held differently stay apart, in order; where their activation specs
    differ too (a foreign checkpoint may calibrate q, k and v apart), the input stays float and each part has its own.
    """

    spec: ActSpec
    packed: tuple[Packed, ...]
    part_specs: tuple[ActSpec, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One block, ready to run."""

    attn_norm: F32
    qkv: Projection
    qk_norms: tuple[F32, F32] | None  # of each head of q and of k, before RoPE
    window: int | None
    o: Projection
    mlp_norm: F32
    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class Model:
    """All weights of a model, packed for one op table."""

    config: ModelConfig
    embedding: Packed
    layers: tuple[Layer, ...]
    norm: F32
    head: Projection


@dataclass(frozen=True)
class Rows:
    """A run of tokens of one sequence: the new ones `ids`, the first of them at position `start`, its `pages`."""

    ids: list[int]
    start: int
    pages: list[int]


def run_layers(
    ops: Ops, model: Model, batch: Batch, rope: tuple[F32, F32], cache: list[LayerCache]
) -> tuple[F32, F32 | None]:
    """The residual stream f32[T, D] before the last block's output f32[T, D], and that output.

    Raises CheckpointError naming the layer where an activation is NaN or infinite and cannot be quantized.
    """
    eps = model.config.norm_eps
    x = ops.embed(model.embedding, batch.ids)
    delta = None
    number = 0
    try:
        for number, layer in enumerate(model.layers):
            pages = cache[number]
            a = ops.add_norm(x, delta, layer.attn_norm, eps, layer.qkv.spec)
            qkv = project(ops, a, layer.qkv)
            q = ops.rope_write(qkv, batch, rope, layer.qk_norms, eps, pages)
            a = ops.quantize(ops.attention(q, batch, pages, layer.window), layer.o.spec)
            delta = project(ops, a, layer.o)
            a = ops.add_norm(x, delta, layer.mlp_norm, eps, layer.gate_up.spec)
            a = ops.silu_mul(project(ops, a, layer.gate_up), layer.down.spec)
            delta = project(ops, a, layer.down)
    except (CheckpointError, CalibrationError) as error:
        raise CheckpointError(f"{block_prefix(number)}: {error}") from None
    return x, delta


def logits_of(ops: Ops, model: Model, x: F32, delta: F32 | None, rows: npt.NDArray[np.int64] | None = None) -> F32:
    """Logits f32[R, V] of `rows` (None: all): the head is the largest linear, so only rows that are needed run it."""
    if rows is not None and len(rows) < len(x):
        x, delta = x[rows], None if delta is None else delta[rows]
    a = ops.add_norm(x, delta, model.norm, model.config.norm_eps, model.head.spec)
    return project(ops, a, model.head)


def project(ops: Ops, a: Activation, group: Projection) -> F32:
    """Outputs f32[T, N] of all linears of a group, side by side."""
    if len(group.packed) == 1:
        return ops.linear(a, group.packed[0])
    inputs = [a] * len(group.packed)
    if group.part_specs and a.values is not None:
        inputs = [ops.quantize(a.values, spec) for spec in group.part_specs]
    return np.concatenate([ops.linear(i, w) for i, w in zip(inputs, group.packed, strict=True)], axis=1)


def batch_of(rows: list[Rows]) -> Batch:
    """The index arrays of one step: per token its id, position and cache slot; per sequence its rows and pages."""
    tables = np.zeros((len(rows), max(len(r.pages) for r in rows)), np.int32)
    for table, r in zip(tables, rows, strict=True):
        table[: len(r.pages)] = r.pages
    if all(len(r.ids) == 1 for r in rows):
        return _decoding_batch(rows, tables)
    ids: list[int] = []
    starts = [0]
    for r in rows:
        ids += r.ids
        starts.append(len(ids))
    owner = np.repeat(np.arange(len(rows)), np.diff(starts))
    positions = np.arange(len(ids)) - np.array(starts)[owner] + np.array([r.start for r in rows])[owner]
    return Batch(
        ids=np.array(ids, np.int32),
        positions=positions.astype(np.int32),
        slots=tables[owner, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        starts=np.array(starts, np.int32),
        context=np.array([r.start + len(r.ids) for r in rows], np.int32),
        tables=tables,
    )


def _decoding_batch(rows: list[Rows], tables: npt.NDArray[np.int32]) -> Batch:
    """One token of every sequence: the step that is run most, in few calls of numpy."""
    return Batch(
        ids=np.array([r.ids[0] for r in rows], np.int32),
        positions=np.array([r.start for r in rows], np.int32),
        slots=np.array([r.pages[r.start // PAGE] * PAGE + r.start % PAGE for r in rows], np.int64),
        starts=np.arange(len(rows) + 1, dtype=np.int32),
        context=np.array([r.start + 1 for r in rows], np.int32),
        tables=tables,
    )


def rope_tables(config: ModelConfig, length: int) -> tuple[F32, F32]:
    """cos and sin f32[length, head_dim/2] of every position of a sequence of at most `length` tokens.

    Angles are products of float32 positions and float32 frequencies, as in HF transformers.
    """
    inverse = config.rope.inverse_frequencies(config.head_dim, length)
    angles = np.outer(np.arange(length, dtype=np.float32), inverse)
    return np.cos(angles), np.sin(angles)
