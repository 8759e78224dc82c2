"""What is inside a model: one row per linear (all its tensors together) and per other tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantbench.infer.checkpoint.gguf import GgufStore
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.quantized import linear_shape
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.vocabulary import LayerPlan


@dataclass(frozen=True)
class Row:
    """`bytes` as stored, of all parts; scales of the weight: smallest and largest, None where there are none."""

    name: str
    stored: str  # "bfloat16", "Q4_K", or "int4 group 64, asymmetric"
    inputs: (
        str  # of a linear: "float", "int8 static 0.031", "int8 per token"; of a prefix its tokens, of anything else ""
    )
    shape: tuple[int, ...]
    bytes: int
    scale_min: float | None = None
    scale_max: float | None = None


def describe(path: str | Path) -> list[Row]:
    """Rows of whatever `open_model` opens, in the order of the names. Raises what `open_model` raises."""
    source = open_model(path)
    plans = source.quantization.layers if source.quantization else {}
    parts: dict[str, list[str]] = {name: [] for name in plans}
    rest: list[str] = []
    for name in source.names():
        module = name.rpartition(".")[0]
        (parts[module] if module in plans and not name.endswith(".bias") else rest).append(name)
    rows = [_linear_row(source, plan, parts[plan.name]) for plan in plans.values()]
    rows += [_tensor_row(source, name) for name in rest]
    rows += [_prefix_row(source.prefix)] if source.prefix else []
    cache = source.quantization.cache if source.quantization else None
    if cache and cache.dynamic:  # of which nothing is stored; static scales are tensors
        shape = (source.config.num_kv_heads, source.config.head_dim)
        rows.append(Row("kv_cache", f"{cache.codes} per token and head", "", shape, 0))
    return sorted(rows, key=lambda row: _natural(row.name))


def _prefix_row(prefix: Prefix) -> Row:
    """Keys and values of the tokens in front of every sequence."""
    tokens = f"token ids {', '.join(map(str, prefix.ids))}"
    return Row("prefix", "float32", tokens, prefix.k.shape, prefix.k.nbytes + prefix.v.nbytes)


def _linear_row(source: ModelSource, plan: LayerPlan, parts: list[str]) -> Row:
    scale = np.asarray(source.read(f"{plan.name}.weight_scale"), np.float32)
    size = f" {plan.group_size}" if plan.group_size else ""
    symmetry = "" if plan.symmetric else ", asymmetric"
    inputs = "float" if plan.activations is None else f"{plan.activations} per token"
    if plan.activations and not plan.dynamic:
        inputs = f"{plan.activations} static {float(source.read(f'{plan.name}.input_scale').reshape(-1)[0]):.4g}"
    return Row(
        plan.name,
        f"{plan.weights} {plan.granularity}{size}{symmetry}",
        inputs,
        linear_shape(plan.name, source.config),
        sum(_bytes(source, part) for part in parts),
        float(scale.min()),
        float(scale.max()),
    )


def _tensor_row(source: ModelSource, name: str) -> Row:
    store = source.store
    stored = store.stored_type(name) if isinstance(store, GgufStore) else store.dtype(name).name
    inputs = "float" if name.endswith(("_proj.weight", "lm_head.weight")) else ""
    scale = np.asarray(source.read(name), np.float32) if name.endswith("_scale") else None
    low, high = (None, None) if scale is None else (float(scale.min()), float(scale.max()))
    return Row(name, stored, inputs, store.shape(name), _bytes(source, name), low, high)


def _bytes(source: ModelSource, name: str) -> int:
    if isinstance(source.store, GgufStore):
        return source.store.stored_bytes(name)
    return source.store.dtype(name).itemsize * int(np.prod(source.store.shape(name), dtype=np.int64))


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
