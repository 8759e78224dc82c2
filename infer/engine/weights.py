"""A ModelSource into packed weights, one block per thread at a time: peak memory is what is packed plus these blocks.

Reading, checking and converting a block run on one thread each, side by side, because most of their time goes where no
loop can be cut: to the first touch of memory, to checksums, to numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quantbench.infer.checkpoint.source import EMBEDDING, LinearWeight, ModelSource
from quantbench.infer.engine.convert import F32, cast, convert, float_dtype
from quantbench.infer.engine.forward import Layer, Model, Projection
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.infer.ops import FLOAT, ActSpec, Ops, Packed
from quantbench.infer.ops.cpu import CpuOps
from quantbench.quantizers.weight import QuantizedWeight
from quantbench.vocabulary import FLOAT_DTYPES, Mode

Convert = Callable[[LinearWeight], LinearWeight]
MOST_WORKERS = 8  # memory of as many blocks beside the packed ones


def load_model(source: ModelSource, ops: Ops, mode: Mode | None) -> Model:
    """All weights packed for `ops`. `mode` None: as stored; a mode: the float source converted to it."""
    workers = min(ops.threads, MOST_WORKERS) if isinstance(ops, CpuOps) else 1  # other tables take one thread
    with ThreadPoolExecutor(workers) as pool:
        ends = pool.submit(_load_ends, source, ops, mode)  # the largest first
        layers = tuple(pool.map(lambda layer: _load_layer(source, ops, mode, layer), range(source.config.num_layers)))
        embedding, logits = ends.result()
    return Model(source.config, embedding, layers, _norm(source, mode, "model.norm.weight"), logits)


def _load_ends(source: ModelSource, ops: Ops, mode: Mode | None) -> tuple[Packed, Projection]:
    """The embedding and the head."""
    keep = _keeper(mode)
    embedding = ops.pack(keep(LinearWeight("model.embed_tokens", source.read(EMBEDDING), None)))
    if source.config.tie_word_embeddings and not _quantized(source, "lm_head"):
        return embedding, Projection(FLOAT, (embedding,))  # one matrix in memory, for both ends, and read once
    return embedding, pack_group(ops, [keep(source.linear("lm_head"))])


def _quantized(source: ModelSource, name: str) -> bool:
    return source.quantization is not None and name in source.quantization.layers


def spec_of(linear: LinearWeight) -> ActSpec:
    """How the input of a linear is quantized."""
    return ActSpec(linear.activations, linear.input_scale)


def pack_group(ops: Ops, linears: list[LinearWeight]) -> Projection:
    """Linears that share an input: one packed weight where their inputs are quantized alike and their weights are
    held alike; otherwise each for itself."""
    specs = tuple(spec_of(linear) for linear in linears)
    if len(set(specs)) > 1:
        return Projection(FLOAT, tuple(map(ops.pack, linears)), specs)
    if len({_layout(linear) for linear in linears}) > 1:
        return Projection(specs[0], tuple(map(ops.pack, linears)))
    return Projection(specs[0], (ops.pack(linears if len(linears) > 1 else linears[0]),))


def _layout(linear: LinearWeight) -> tuple[object, ...]:
    w = linear.weight
    if isinstance(w, QuantizedWeight):
        ragged = w.granularity == "block" and w.codes.shape[0] % 128 != 0  # its row blocks cannot be stacked
        return (w.format, w.granularity, w.group_size, w.zero is None, linear.name if ragged else None)
    return (w.dtype,)


def _keeper(mode: Mode | None) -> Convert:
    """What happens to the embedding and the head: cast to the mode's float dtype, or nothing."""
    if mode is None:
        return lambda linear: linear
    dtype = float_dtype(mode)
    return lambda linear: cast(linear, dtype)


def _load_layer(source: ModelSource, ops: Ops, mode: Mode | None, layer: int) -> Layer:
    prefix = block_prefix(layer)
    rounds = ops if isinstance(ops, CpuOps) else None
    groups: dict[str, list[LinearWeight]] = {}
    for line in LINEARS:
        linear = source.linear(f"{prefix}.{line.name}")
        groups.setdefault(line.fused, []).append(linear if mode is None else convert(linear, mode, rounds))
    packed = {name: pack_group(ops, linears) for name, linears in groups.items()}

    def norm(name: str) -> F32:
        return _norm(source, mode, f"{prefix}.{name}.weight")

    return Layer(
        attn_norm=norm("input_layernorm"),
        qkv=packed["qkv"],
        qk_norms=(norm("self_attn.q_norm"), norm("self_attn.k_norm")) if source.config.qk_norm else None,
        window=source.config.window_of(layer),
        o=packed["o"],
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=packed["gate_up"],
        down=packed["down"],
    )


def _norm(source: ModelSource, mode: Mode | None, name: str) -> F32:
    """A norm's weight in float32; in the float modes rounded to the mode's dtype, as every weight of theirs is."""
    weight = source.read(name)
    if mode is not None and mode.weights in FLOAT_DTYPES:
        weight = weight.astype(float_dtype(mode))
    return np.ascontiguousarray(weight, np.float32)
