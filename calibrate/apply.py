"""Carry out what the scale table says on one block, and hand the checkpoint writer its tensors.

Nothing is decided here: transforms are folded with the table's factors, weights become codes under the table's scales.
Names and layouts are those of compressed-tensors: infer/checkpoint/tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from quantbench.calibrate.biases import WORD as CORRECTION
from quantbench.calibrate.biases import held_biases
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.tensors import cache_tensors, linear_tensors
from quantbench.infer.models import LINEARS, ModelConfig, block_prefix
from quantbench.quantizers.bias_correction import corrected_bias
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.kv_smooth import fold_into_keys
from quantbench.quantizers.methods import METHODS
from quantbench.quantizers.shift import fold_shift
from quantbench.quantizers.smooth import fold_into_inputs, fold_into_norm, fold_into_outputs, repeat_heads
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight
from quantbench.scales.arrays import F32, Array
from quantbench.scales.statistics import Statistics, scaled
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import LayerPlan, VariantPlan

KEYS = "self_attn.k_proj"  # what it puts out is read by no linear, but by the queries
STORAGE: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def apply_block(
    layer: int,
    weights: Mapping[str, F32],
    table: ScaleTable,
    variant: VariantPlan,
    config: ModelConfig,
    statistics: Mapping[str, Statistics] | None = None,
) -> dict[str, Array]:
    """Full tensor name -> array of one block as the checkpoint stores it.

    weights: name within the block -> f32, untransformed. table: holds at least this block's entries. statistics: of the
    untransformed taps, asked for only by methods that need a Hessian. Scales stay float32; floats take variant.dtype.
    Raises CalibrationError for NaN, Inf or a float that variant.dtype cannot hold, CheckpointError for an absent entry.
    """
    prefix = block_prefix(layer)
    folded = fold_block(layer, weights, table, config)
    seen = transformed(layer, statistics, table, config) if statistics else {}
    quantized = {f"{line.name}.weight": line for line in LINEARS if _plan(variant, prefix, line.name).quantized}
    result: dict[str, Array] = {}
    for name, line in quantized.items():
        codes = _codes(_plan(variant, prefix, line.name), folded[name], table, seen.get(line.tap))
        if f"{prefix}.{line.tap}.{CORRECTION}" in table:
            means = table[f"{prefix}.{line.tap}.{CORRECTION}"]
            folded[f"{line.name}.bias"] = _corrected(folded, line.name, codes, means)
        result |= _tensors(_plan(variant, prefix, line.name), codes, table)
    for name in sorted(held_biases(config, variant)):
        folded.setdefault(f"{name}.bias", np.zeros(len(folded[f"{name}.weight"]), np.float32))
    for name, value in folded.items():
        if name not in quantized:
            result[f"{prefix}.{name}"] = _stored(f"{prefix}.{name}", value, variant.dtype)
    if variant.cache.calibrated:
        result |= _cache_scales(prefix, table)
    return result


def _codes(plan: LayerPlan, w: F32, table: ScaleTable, seen: Statistics | None) -> QuantizedWeight:
    method = METHODS[plan.method]
    if method.needs_hessian and (seen is None or seen.hessian is None):
        raise CalibrationError(f"{plan.name}: method {plan.method} needs the Hessian of its input: collect it")
    return method.quantize(w, table[f"{plan.name}.weight"], seen, **dict(plan.options))


def _corrected(folded: Mapping[str, F32], name: str, codes: QuantizedWeight, means: Entry) -> F32:
    """The bias [N] of a linear that takes back the mean of what quantizing adds to its output."""
    wide, served = means.absmax.astype(np.float64), means.scale.astype(np.float64)
    return corrected_bias(folded[f"{name}.weight"], dequantize_weight(codes), wide, folded.get(f"{name}.bias"), served)


def _tensors(plan: LayerPlan, codes: QuantizedWeight, table: ScaleTable) -> dict[str, Array]:
    """The checkpoint's tensors of one quantized linear, by full name."""
    static = plan.activations is not None and not plan.dynamic
    input_scale = float(table[f"{plan.name}.input"].scale[0]) if static else None
    parts = linear_tensors(plan, codes, input_scale)
    return {f"{plan.name}.{part}": value for part, value in parts.items()}


def _cache_scales(prefix: str, table: ScaleTable) -> dict[str, Array]:
    """k_scale and v_scale [KV, 1, 1] by full name."""
    k, v = (table[f"{prefix}.self_attn.{part}"].scale for part in ("k_cache", "v_cache"))
    return {f"{prefix}.{name}": scale for name, scale in cache_tensors(k, v).items()}


def fold_block(layer: int, weights: Mapping[str, F32], table: ScaleTable, config: ModelConfig) -> dict[str, F32]:
    """The block's weights behind its transforms: the same float function, other ranges."""
    folded = dict(weights)
    for shift in _shifts(layer, table):
        folded |= fold_shift(folded, shift, config.num_heads, config.head_dim)
    for source, factors in smoothing(layer, table).items():
        if source == KEYS:
            folded |= fold_into_keys(folded, factors, config.num_heads, config.head_dim)
            continue
        weight, bias = folded[f"{source}.weight"], folded.get(f"{source}.bias")
        if weight.ndim == 1:
            folded[f"{source}.weight"] = fold_into_norm(weight, factors)
        else:
            folded[f"{source}.weight"], bias = fold_into_outputs(weight, bias, factors)
        if bias is not None:
            folded[f"{source}.bias"] = bias
        for line in LINEARS:
            if line.source == source:
                name = f"{line.name}.weight"
                folded[name] = fold_into_inputs(folded[name], input_factors(source, factors, config))
    return folded


def transformed(
    layer: int, statistics: Mapping[str, Statistics], table: ScaleTable, config: ModelConfig
) -> dict[str, Statistics]:
    """Statistics of the taps behind the block's transforms, as far as they can be derived (statistics.scaled)."""
    factors = tap_factors(layer, table, config)
    return {tap: scaled(s, factors[tap]) if tap in factors else s for tap, s in statistics.items()}


def tap_shifts(layer: int, table: ScaleTable, config: ModelConfig) -> dict[str, F32]:
    """Tap -> f32[C] by which a shift moves it down, before the factors multiply it."""
    return {
        tap: repeat_heads(shift, config.num_heads, config.head_dim) if tap == "o_in" else shift
        for shift in _shifts(layer, table)
        for tap in ("o_in", "v")
    }


def _shifts(layer: int, table: ScaleTable) -> list[F32]:
    """What the block's values move down by [KV*d], where there is a shift."""
    name = f"{block_prefix(layer)}.self_attn.v_proj.shift"
    return [table[name].scale] if name in table else []


def tap_factors(layer: int, table: ScaleTable, config: ModelConfig) -> dict[str, F32]:
    """Tap -> f32[C] by which the block's transforms multiply it. Taps that no transform touches are absent."""
    result: dict[str, F32] = {}
    for source, factors in smoothing(layer, table).items():
        if source == KEYS:
            result["k"] = np.float32(1) / factors
            continue
        tap = next(line.tap for line in LINEARS if line.source == source)
        result[tap] = np.float32(1) / input_factors(source, factors, config)
        if source == "self_attn.v_proj":
            result["v"] = np.float32(1) / factors
    return result


def smoothing(layer: int, table: ScaleTable) -> dict[str, F32]:
    """Source within the block (a norm, v_proj, up_proj, or k_proj: KEYS) -> factors its output is divided by."""
    prefix = block_prefix(layer) + "."
    return {
        e.name.removeprefix(prefix).removesuffix(".smooth"): e.scale
        for e in table
        if e.kind == "transform" and e.name.startswith(prefix) and e.name.endswith(".smooth")
    }


def input_factors(source: str, factors: F32, config: ModelConfig) -> F32:
    """Factors of the input channels behind `source`; v_proj's repeat over the query heads that share a KV head."""
    return repeat_heads(factors, config.num_heads, config.head_dim) if source == "self_attn.v_proj" else factors


def _plan(variant: VariantPlan, prefix: str, linear: str) -> LayerPlan:
    name = f"{prefix}.{linear}"
    return variant.layers.get(name) or LayerPlan(name, variant.dtype)


def _stored(name: str, value: F32, dtype: str) -> Array:
    require_finite(value, name)
    with np.errstate(over="ignore"):
        stored = value.astype(STORAGE[dtype])
    if not np.all(np.isfinite(stored)):
        raise CalibrationError(
            f"{name}: values up to {np.abs(value).max():.3g} overflow {dtype}; store floats as bfloat16"
        )
    return stored
