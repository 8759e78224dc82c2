"""What each fused group of linears costs when it alone is quantized: a quick estimate, from files of the run.

A group is what the runtime multiplies at once and a recipe must quantize alike: q/k/v, o, gate/up, down, and the head.

    estimate = E|dW x|^2 / E|W x|^2  +  E|dx|^2 / E|x|^2

the relative squared error of the group's output, by the weights as stored in the checkpoint (dW = W - stored) and the
saved statistics of its input: exact for the weights where a Hessian was saved (tr dW H dWT), else with the channels'
second moments (`second_moments`), cross terms left out. It knows nothing of what later layers make of the error, so it
compares modes of one group better than groups with each other; `calibrate/trials.py` measures instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantbench.calibrate.apply import fold_block, tap_factors, transformed
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight
from quantbench.scales.arrays import F32, F64
from quantbench.scales.error import energy
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import ScaleTable

HEAD = "lm_head"
_E4M3_ROUNDING = 1 / 1792  # (2^-3)^2 / 12 over the mean square 7/3 of a binade, relative: the same at every magnitude


@dataclass(frozen=True)
class Group:
    """Linears that share one input and one treatment."""

    name: str  # "model.layers.3.gate_up", or "lm_head"
    layer: int | None  # None: the head
    fused: str  # "qkv" | "o" | "gate_up" | "down" | "lm_head"
    linears: tuple[str, ...]  # full names


def groups_of(num_layers: int) -> list[Group]:
    """Every group of a model, in the order of the computation."""
    kinds = dict.fromkeys(line.fused for line in LINEARS)
    blocks = [
        Group(
            f"{block_prefix(layer)}.{kind}",
            layer,
            kind,
            tuple(f"{block_prefix(layer)}.{line.name}" for line in LINEARS if line.fused == kind),
        )
        for layer in range(num_layers)
        for kind in kinds
    ]
    return [*blocks, Group(HEAD, None, HEAD, (HEAD,))]


def quantized_groups(checkpoint: ModelSource) -> list[Group]:
    """The groups of which a checkpoint holds at least one linear quantized."""
    layers = checkpoint.quantization.layers if checkpoint.quantization else {}
    return [g for g in groups_of(checkpoint.config.num_layers) if any(name in layers for name in g.linears)]


def estimate_block(
    layer: int,
    source: ModelSource,
    checkpoint: ModelSource,
    table: ScaleTable,
    statistics: Mapping[str, Statistics],
) -> dict[str, float]:
    """Group name -> estimate (see the module) of the quantized groups of one block.

    `statistics` are of the untransformed taps of the block, `table` holds its entries. Raises what reading raises.
    """
    folded = fold_block(layer, source.float_block(layer), table, source.config)
    factors = tap_factors(layer, table, source.config)
    behind = transformed(layer, statistics, table, source.config)
    found = {}
    for group in quantized_groups(checkpoint):
        if group.layer == layer:
            tap = next(line.tap for line in LINEARS if line.fused == group.fused)
            moments = second_moments(statistics[tap]) * np.square(factors.get(tap, np.float32(1)), dtype=np.float64)
            weights = _weight_loss(group, folded, checkpoint, moments, behind[tap].hessian)
            found[group.name] = weights + _input_loss(group, checkpoint, table, moments)
    return found


def second_moments(s: Statistics) -> F64:
    """E x_c^2 of every channel, f64[C]: the Hessian's diagonal where it was saved. Else mean_c^2 + a absmax_c^2, with
    the one `a` that makes the sum what the histogram says: a channel's spread is taken to follow its absmax."""
    if s.hessian is not None:
        return np.diagonal(s.hessian) / s.tokens
    mean = s.channel_sum / s.tokens
    spread = np.square(s.channel_absmax, dtype=np.float64)
    if s.histogram is None:
        return np.square(mean) + spread / 12
    seen = sum(energy(s.histogram[row], float(s.limit[row])) for row in range(s.rows)) / s.tokens
    share = max(seen - float(np.square(mean).sum()), 0.0) / max(float(spread.sum()), 1e-300)
    return np.asarray(np.square(mean) + share * spread)


def _weight_loss(
    group: Group, folded: Mapping[str, F32], checkpoint: ModelSource, moments: F64, hessian: F64 | None
) -> float:
    """E|dW x|^2 / E|W x|^2 over all linears of a group."""
    noise = signal = 0.0
    for name in group.linears:
        w, stored = folded[f"{name.split('.', 3)[3]}.weight"], checkpoint.linear(name).weight
        signal += output_energy(w, moments, hessian)
        if isinstance(stored, QuantizedWeight):
            noise += output_energy(w - dequantize_weight(stored), moments, hessian)
    return noise / signal if signal else 0.0


def output_energy(w: F32, moments: F64, hessian: F64 | None) -> float:
    """sum_n E (w_n x)^2 up to the number of tokens: tr(w H wT), or its diagonal."""
    if hessian is None:
        return float(np.einsum("nk,nk->k", w, w, dtype=np.float64) @ moments)
    wide = w.astype(np.float64)
    per_token = float(moments.sum()) / max(float(np.trace(hessian)), 1e-300)
    return float(np.einsum("nk,nk->", wide @ hessian, wide)) * per_token


def _input_loss(group: Group, checkpoint: ModelSource, table: ScaleTable, moments: F64) -> float:
    """E|dx|^2 / E|x|^2: of a static scale what the table says, else what `input_noise` does."""
    linear = checkpoint.linear(group.linears[0])
    if linear.activations is None:
        return 0.0
    entry = table[f"{group.linears[0]}.input"]
    return input_noise(linear.activations, linear.input_scale, moments) if entry.loss is None else entry.loss


def input_noise(activations: str, scale: float | None, moments: F64) -> float:
    """E|dx|^2 / E|x|^2 of rounding an input with these E x_c^2 (f64[C]): under a static `scale`, none of it beyond the
    range; with scales per token (None) under a range of sqrt(max(largest moment, 2 ln C times the mean one)): a channel
    that is always large, or else the expected largest of C normal values."""
    if activations == "fp8_e4m3":
        return _E4M3_ROUNDING
    mean = max(float(moments.mean()), 1e-300)
    if scale is not None:
        return scale**2 / 12 / mean
    top = max(float(moments.max()), 2 * np.log(len(moments)) * mean)
    return float(top / 127**2 / 12 / mean)
