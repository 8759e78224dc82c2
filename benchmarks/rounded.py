"""Checkpoints rounded to nearest, written as `quantbench calibrate` writes them but not calibrated, to measure speed.

`rounded(source, "a8w8+head", directory)` writes one. A mode is a name of quantbench.vocabulary; `+head` holds the
output head as weight-only int8: what the recipe rule `{match: lm_head, mode: weight_only_int8}` does. Activations are
quantized per token. Scales of an int8 KV cache are made up: its tokens mean nothing, its speed is that of any other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantbench.infer.checkpoint.quantized import linear_shape
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.checkpoint.tensors import cache_tensors, linear_tensors
from quantbench.infer.checkpoint.write import CheckpointWriter
from quantbench.infer.engine.convert import round_to_nearest
from quantbench.infer.models import ModelConfig, block_prefix, linear_names
from quantbench.infer.ops import load_ops
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import FLOAT_DTYPES, CachePlan, LayerPlan, Mode, VariantPlan, parse_mode

HEADED = "+head"
CACHE_SCALE = 8.0 / 127.0


def rounded(source: ModelSource, mode: str, directory: Path) -> Path:
    """Writes `source`, a float model, in `mode` below `directory`, and returns where."""
    kind = parse_mode(mode.removesuffix(HEADED))
    dtype = kind.weights if kind.weights in FLOAT_DTYPES else "bfloat16"
    layers = {name: _plan(name, kind, source.config) for name in linear_names(source.config)}
    head = parse_mode("weight_only_int8" if mode.endswith(HEADED) else "bf16")
    layers["lm_head"] = _plan("lm_head", head, source.config)
    variant = VariantPlan(mode, kind, dtype, CachePlan(kind.cache), layers)
    writer = CheckpointWriter(directory / mode, source, variant)
    for layer in range(source.config.num_layers):
        writer.add_block(layer, _block(source, variant, layer))
    table = ScaleTable()
    if layers["lm_head"].quantized:
        scale = round_to_nearest(source.float_tensor("lm_head.weight"), "int8", load_ops("cpu")).scale
        absmax = scale * np.float32(127)
        table.add(Entry("lm_head.weight", "weight", "int8", "channel", scale, None, absmax, None, "absmax", "", None))
    return writer.finish(table)


def _plan(name: str, mode: Mode, config: ModelConfig) -> LayerPlan:
    if mode.weights in FLOAT_DTYPES:
        return LayerPlan(name, mode.weights)
    like = round_to_nearest(np.ones((1, linear_shape(name, config)[1]), np.float32), mode.weights)
    dynamic = mode.activations is not None
    return LayerPlan(
        name, mode.weights, like.granularity, like.group_size, activations=mode.activations, dynamic=dynamic
    )


def _block(source: ModelSource, variant: VariantPlan, layer: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, weight in source.float_block(layer).items():
        linear = name.removesuffix(".weight")
        plan = variant.layers.get(f"{block_prefix(layer)}.{linear}")
        if plan is None or not plan.quantized:
            found[name] = weight
            continue
        parts = linear_tensors(plan, round_to_nearest(weight, plan.weights, load_ops("cpu")))
        found |= {f"{linear}.{part}": array for part, array in parts.items()}
    if variant.cache.calibrated:
        scales = np.full(source.config.num_kv_heads, CACHE_SCALE, np.float32)
        found |= cache_tensors(scales, scales)
    return found
