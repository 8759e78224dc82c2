"""What looks wrong, and what to try.

Every rule is a function from facts to a finding or None; its threshold is a constant here and a row of docs/report.md.
Findings advise, they never change a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantbench.reports.formatting import decibel, percent, plain, times
from quantbench.reports.layers import TAP_OF, LayerFacts

LEVELS_LOST = 4.0  # static int8: with fewer steps than this for ordinary values the layer computes with noise
LEVELS_FEW = 12.0  # and with fewer than this it is worth a look
FP8_REACH = 448 / 2**-6  # largest e4m3 over its smallest normal: beyond it ordinary values become subnormal
WEIGHT_DB = {"int8": 30.0, "int4": 15.0, "fp8_e4m3": 25.0}
INPUT_DB = 20.0
CACHE_DB = 20.0
INCREASE_NOTICEABLE, INCREASE_UNUSABLE = 0.05, 0.20
SERVED_TOP1, SERVED_KL = 0.998, 1e-4  # served against simulated
WORST_SHOWN = 5
FOLDABLE_TAPS = ("attn_in", "mlp_in", "down_in")  # a norm or up_proj before them can take the factors of smoothing
STATIC_ALPHA = 0.9  # one scale for all tokens wants nearly all of an outlier in the weights: docs/results.md

SEVERITIES = ("bad", "warn")


@dataclass(frozen=True)
class Finding:
    """`what` is one sentence with the numbers, `advice` what to try, in the order of trying."""

    severity: str  # "bad": the variant should not be deployed like this; "warn": worth a look
    rule: str
    variant: str
    layer: str | None
    what: str
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"advice": list(self.advice)}


LayerRule = Callable[[str, LayerFacts], Finding | None]


def outlier_input(variant: str, layer: LayerFacts) -> Finding | None:
    """A static int8 range stretched by a few large values."""
    if layer.levels is None or layer.levels >= LEVELS_FEW:
        return None
    lost = layer.levels < LEVELS_LOST
    if layer.input_p999 is None:
        steps = plain(layer.levels, 2)
        what = f"input of {layer.name}, {layer.last_stage}, leaves about {steps} of 127 steps to an ordinary channel"
    else:
        what = (
            f"input of {layer.name} reaches {plain(layer.input_absmax)} while 99.9% of its values are below "
            f"{plain(layer.input_p999, 2)}: they share {plain(layer.levels, 2)} of 127 steps"
        )
    return Finding(
        "bad" if lost else "warn", "outlier_input", variant, layer.name, what, _outlier_advice(variant, layer)
    )


def _outlier_advice(variant: str, layer: LayerFacts) -> tuple[str, ...]:
    """Lines for the recipe. Smoothing first, where it can be folded away and has not been tried."""
    rule = f'rules: [{{match: "{together(layer)}", variants: [{variant}]'
    smoothable = layer.tap in FOLDABLE_TAPS and layer.activations == "int8" and not layer.smoothed
    return (
        *([f"smooth it: transforms: [{{smooth: {{alpha: {STATIC_ALPHA}}}}}]"] if smoothable else []),
        f"scales per token: {rule}, activations: {{dynamic: true}}}}]",
        f"or leave it float: {rule}, mode: float}}]",
    )


_TIED = {"attn_in": "[qkv]_proj", "mlp_in": "[gu]*_proj"}


def together(layer: LayerFacts) -> str:
    """A glob for `layer` and the linears that run with it as one product: a recipe must decide them alike."""
    parent, _, name = layer.name.rpartition(".")
    return f"{parent}.{_TIED[layer.tap]}" if layer.tap in _TIED and name in TAP_OF else layer.name


def fp8_underflow(variant: str, layer: LayerFacts) -> Finding | None:
    """A static fp8 range so wide that ordinary values lose mantissa bits."""
    static = layer.activations == "fp8_e4m3" and not layer.dynamic
    if not static or not layer.input_p999 or not layer.input_absmax:
        return None
    if layer.input_absmax / layer.input_p999 < FP8_REACH:
        return None
    what = (
        f"input of {layer.name} reaches {plain(layer.input_absmax)}, {times(layer.input_absmax / layer.input_p999)} "
        f"what 99.9% of its values stay below: fp8 keeps fewer than 3 mantissa bits of them"
    )
    return Finding("warn", "fp8_underflow", variant, layer.name, what, _outlier_advice(variant, layer))


_GPTQ = "codes by the error of the outputs: method: {gptq: {act_order: true}}"
_CHANNELS = "weights: {granularity: channel}"
_FLOAT = "keep this layer float by rule"
_WEIGHT_ADVICE = {
    "int8": (_CHANNELS, _GPTQ, _FLOAT),
    "int4": (
        _GPTQ,
        "a smaller group: weights: {granularity: group, group_size: 32}",
        "weights: {symmetric: false}",
        "weights: {observer: mse}",
        "8 bits for this layer by rule: mode: weight_only_int8",
    ),
    "fp8_e4m3": (_CHANNELS, "int8 weights: mode a8w8", _FLOAT),
}


def _weight_advice(layer: LayerFacts) -> tuple[str, ...]:
    """What has not been done to it already."""
    done = {_CHANNELS: layer.granularity == "channel", _GPTQ: layer.method == "gptq"}
    lines = tuple(line for line in _WEIGHT_ADVICE[layer.weights] if not done.get(line))
    less = ("a smaller alpha, which moves less of the input into the weight",)
    return (*(less if layer.smoothed and layer.activations is not None else ()), *lines)


def noisy_weight(variant: str, layer: LayerFacts) -> Finding | None:
    limit = WEIGHT_DB.get(layer.weights)
    if limit is None or layer.weight_sqnr_db is None or layer.weight_sqnr_db >= limit:
        return None
    what = (
        f"weight of {layer.name} keeps {decibel(layer.weight_sqnr_db)} in {layer.weights}; {decibel(limit)} is expected"
    )
    return Finding("warn", "noisy_weight", variant, layer.name, what, _weight_advice(layer))


def noisy_input(variant: str, layer: LayerFacts) -> Finding | None:
    """The whole input is rounded coarsely although no single outlier explains it (that is `outlier_input`)."""
    if layer.input_sqnr_db is None or layer.input_sqnr_db >= INPUT_DB:
        return None
    if layer.levels is not None and layer.levels < LEVELS_FEW:
        return None
    what = f"input of {layer.name} keeps {decibel(layer.input_sqnr_db)}; {decibel(INPUT_DB)} is expected"
    return Finding("warn", "noisy_input", variant, layer.name, what, _outlier_advice(variant, layer))


def silent_input(variant: str, layer: LayerFacts) -> Finding | None:
    if layer.input_absmax != 0:
        return None
    what = f"input of {layer.name} was zero throughout calibration: its scale is meaningless"
    return Finding("warn", "silent_input", variant, layer.name, what, ("calibrate on text that reaches this layer",))


LAYER_RULES: tuple[LayerRule, ...] = (outlier_input, fp8_underflow, noisy_weight, noisy_input, silent_input)


def layer_findings(variant: str, layers: Sequence[LayerFacts]) -> list[Finding]:
    """Findings of all layers, the worst first, one per shared input: q, k and v see the same tensor."""
    found: dict[tuple[str, object], Finding] = {}
    for layer in sorted(layers, key=lambda layer: math.inf if layer.worst_db is None else layer.worst_db):
        for rule in LAYER_RULES:
            finding = rule(variant, layer)
            if finding is None:
                continue
            shared = finding.rule != "noisy_weight" and layer.tap is not None and layer.block is not None
            found.setdefault((finding.rule, (layer.block, layer.tap) if shared else layer.name), finding)
    return list(found.values())


def accuracy_finding(variant: str, record: Mapping[str, Any], layers: Sequence[LayerFacts]) -> Finding | None:
    """Perplexity far above the baseline's, with what to try for the layers that this variant has."""
    worst = max(
        (p for p in record["accuracy"]["perplexity"] if p["increase"] is not None),
        key=lambda p: float(p["increase"]),
        default=None,
    )
    if worst is None or worst["increase"] < INCREASE_NOTICEABLE:
        return None
    unusable = worst["increase"] >= INCREASE_UNUSABLE
    what = f"perplexity on {worst['data']} is {plain(worst['perplexity'], 4)}, {percent(worst['increase'], sign=True)}"
    return Finding("bad" if unusable else "warn", "perplexity", variant, None, what, _accuracy_advice(layers))


def _accuracy_advice(layers: Sequence[LayerFacts]) -> tuple[str, ...]:
    outliers = {(layer.block, layer.tap) for layer in layers if layer.levels is not None and layer.levels < LEVELS_FEW}
    if outliers:
        return (
            f"mend the {len(outliers)} inputs with outliers, or all at once: transforms: "
            f"[{{smooth: {{alpha: {STATIC_ALPHA}}}}}]",
            "or scales per token: activations: {dynamic: true}",
        )
    keep = "keep the layers with the lowest SQNR in float by rule: mode: float"
    if any(layer.weights == "int4" for layer in layers):
        method = ("method: {gptq: {act_order: true}}",) if any(layer.method == "rtn" for layer in layers) else ()
        return (*method, "weights: {granularity: group, group_size: 32, symmetric: false}", keep)
    return (keep,)


def parity_findings(variant: str, record: Mapping[str, Any]) -> list[Finding]:
    """Codes that differ on identical inputs are a defect. Outputs that differ are worth a look: rounding may amplify
    them, and a gate (parity_top1, parity_kl) says how much of that a recipe accepts."""
    parity = record["parity"]
    if parity is None:
        return []
    found = []
    if parity["codes_different"] or parity["scales_different"]:
        what = (
            f"{parity['codes_different']:,} of {parity['codes_compared']:,} codes and {parity['scales_different']:,} "
            "scales differ on identical inputs: the kernel breaks the specification"
        )
        found.append(Finding("bad", "parity_codes", variant, None, what, _CODES_ADVICE))
    top1, kl, departure = parity["top1_served_simulated"], parity["kl_served_simulated"], parity["first_departure"]
    if departure or (top1 is not None and top1 < SERVED_TOP1) or (kl is not None and kl > SERVED_KL):
        what = f"served against simulated: top-1 {percent(top1)}, KL {plain(kl)}"
        what += f"; first departs at {departure['layer']}: {departure['why']}" if departure else ""
        found.append(Finding("warn", "parity", variant, None, what, _PARITY_ADVICE))
    return found


_CODES_ADVICE = (
    "do not deploy before this is understood: QUANTBENCH_ISA=generic, then quantbench lint the checkpoint",
)
_PARITY_ADVICE = ("the accuracy above is of what is served; gates: {parity_top1: 99%} makes this a condition",)


def slow_findings(variant: str, record: Mapping[str, Any]) -> list[Finding]:
    """A quantized variant that decodes slower than the baseline, with the engine's own reason."""
    found = []
    for batch, decode in record["speed"]["decode"].items():
        if decode["speedup"] is not None and decode["speedup"] < 1 and record["quantized"]:
            what = f"decode at batch {batch} runs at {times(decode['speedup'])} of the baseline"
            why = (decode["why"],) if decode["why"] else ()
            found.append(Finding("warn", "slower", variant, None, what, why))
    return found


def cache_finding(variant: str, losses: Mapping[str, float | None]) -> Finding | None:
    """losses: SQNR in dB by name of the cache entry. One finding for the worst of them."""
    low = {name: db for name, db in losses.items() if db is not None and db < CACHE_DB}
    if not low:
        return None
    worst = min(low, key=lambda name: (low[name], name))
    what = f"{worst} keeps {decibel(low[worst])}; {decibel(CACHE_DB)} is expected ({len(low)} caches are below)"
    dynamic = "a scale per token: mode suffix c8_dynamic or c8_fp8_dynamic"
    advice = ("cache_kv: {observer: percentile}", "an fp8 cache: mode suffix c8_fp8", dynamic)
    return Finding("warn", "noisy_cache", variant, None, what, advice)
