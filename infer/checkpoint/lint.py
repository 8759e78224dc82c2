"""What is wrong, or looks wrong, with a checkpoint: every tensor read and judged. `error` findings refuse it.

error    it cannot be opened; bytes differ from the record; a float, scale or input scale is NaN, infinite, zero or
         negative; static scales differ inside a fused group (an engine that fuses q/k/v or gate/up would take the
         largest and serve something else than was scored)
warning  outputs whose codes are all zero; many codes at the end of the range; scales far larger than their codes need;
         linears of one fused group stored differently
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantbench.errors import QuantbenchError
from quantbench.infer.checkpoint.check import FLOATS
from quantbench.infer.checkpoint.record import RecordedStore
from quantbench.infer.checkpoint.shard import Array
from quantbench.infer.checkpoint.source import F32, ModelSource, open_model
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.quantizers.finite import count_not_finite
from quantbench.quantizers.formats import E4M3, FORMATS
from quantbench.quantizers.weight import QuantizedWeight, expand
from quantbench.scales.lint import Finding
from quantbench.vocabulary import BLOCK_SHAPE

# Share of codes at the end of the range above which a scale is probably too small. Absmax itself puts one code of
# each scale's span there (that share is allowed on top, twice), and a coarse format several.
_SATURATED = {"int8": 0.01, "int4": 0.15, "fp8_e4m3": 0.01}
_SIGNLESS, _LARGEST, _NAN = 0x7F, 0x7E, 0x7F  # bits of e4m3: mask of the sign, 448, NaN; casts of it are slow
_UNUSED = 4.0  # a scale this many times larger than its codes need wastes two bits


def lint_checkpoint(path: Path) -> list[Finding]:
    """Findings of a checkpoint or float HF directory, errors first. Raises nothing for a damaged one: it reports."""
    try:
        source = open_model(path)
    except QuantbenchError as refused:
        return [Finding("error", str(path), problem) for problem in refused.problems]
    found = [*_damage(source), *_not_finite(source)]
    if source.quantization is not None:
        found += [*_untied(source), *_codes(source, damaged={f.name for f in found})]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _damage(source: ModelSource) -> Iterator[Finding]:
    if isinstance(source.store, RecordedStore):
        for name in source.names():
            yield from (Finding("error", name, problem) for problem in source.store.damage(name))


def _not_finite(source: ModelSource) -> Iterator[Finding]:
    for name in source.names():
        values = source.store.read(name)
        bad = 0
        if values.dtype == E4M3:
            bad = int((values.view(np.uint8) & _SIGNLESS == _NAN).sum())
        elif values.dtype in FLOATS:
            bad = count_not_finite(values)
        if bad:
            yield Finding("error", name, f"{bad} of {values.size} values are NaN or infinite")


def _untied(source: ModelSource) -> Iterator[Finding]:
    for layer in range(source.config.num_layers):
        for group in sorted({line.fused for line in LINEARS}):
            names = [f"{block_prefix(layer)}.{line.name}" for line in LINEARS if line.fused == group]
            yield from _untied_group(source, names)


def _untied_group(source: ModelSource, names: list[str]) -> Iterator[Finding]:
    assert source.quantization is not None
    plans = [source.quantization.layers.get(name) for name in names]
    schemes = {(p.weights, p.granularity, p.group_size, p.activations, p.dynamic) if p else None for p in plans}
    if len(schemes) > 1:
        yield Finding("warning", names[0], f"stored differently from others of its fused group: {', '.join(names)}")
        return
    plan = plans[0]
    if plan is None:
        return
    shared = ["input_scale"] if plan.activations and not plan.dynamic else []
    if plan.weights == "fp8_e4m3" and plan.granularity == "tensor":
        shared.append("weight_scale")
    for part in shared:
        values = {float(np.asarray(source.read(f"{name}.{part}"), np.float32).reshape(-1)[0]) for name in names}
        if len(values) > 1:
            listed = ", ".join(f"{value:.9g}" for value in sorted(values))
            yield Finding("error", f"{names[0]}.{part}", f"differs inside the fused group {', '.join(names)}: {listed}")


def _codes(source: ModelSource, damaged: set[str]) -> Iterator[Finding]:
    assert source.quantization is not None
    for name in source.quantization.layers:
        if not damaged & {f"{name}.weight", f"{name}.weight_packed"}:
            weight = source.linear(name).weight
            assert isinstance(weight, QuantizedWeight)
            yield from (Finding("warning", name, message) for message in _code_messages(weight))


def _code_messages(weight: QuantizedWeight) -> Iterator[str]:
    magnitudes = _magnitudes(weight)
    dead = int((magnitudes.max(axis=1) == 0).sum())
    if dead:
        yield f"{dead} of {magnitudes.shape[0]} outputs have only zero codes"
    rate = saturation(weight)
    if rate > _SATURATED[weight.format] + 2 * weight.scale.size / weight.codes.size:
        yield f"{rate:.1%} of the codes are at the end of the range; the scale may be too small"
    if weight.zero is None:
        highest = _highest(magnitudes, weight)
        wasted = int(((highest > 0) & (highest * _UNUSED < FORMATS[weight.format].qmax)).sum())
        if wasted:
            yield f"{wasted} of {highest.size} scales are over {_UNUSED:.0f} times larger than their codes need"


def saturation(weight: QuantizedWeight) -> float:
    """Share of codes that are the smallest or largest of the format."""
    if weight.codes.dtype == E4M3:
        return float((weight.codes.view(np.uint8) & _SIGNLESS >= _LARGEST).mean())
    fmt = FORMATS[weight.format]
    return float(((weight.codes <= fmt.qmin) | (weight.codes >= fmt.qmax)).mean())


def _magnitudes(weight: QuantizedWeight) -> Array:
    """|code - zero| [N, K] as integers; of e4m3 the bits without the sign, which are in the order of the values."""
    if weight.codes.dtype == E4M3:
        return weight.codes.view(np.uint8) & _SIGNLESS
    codes = weight.codes.astype(np.int16)
    if weight.zero is not None:
        shape = (codes.shape[0], codes.shape[1])
        codes -= expand(weight.zero, weight.granularity, shape, weight.group_size).astype(np.int16)
    return np.abs(codes)


def _highest(magnitudes: Array, weight: QuantizedWeight) -> F32:
    """The largest |code| under each scale, one per scale."""
    if weight.granularity == "tensor":
        height, width = magnitudes.shape
    elif weight.granularity == "block":
        height, width = BLOCK_SHAPE
    else:
        height, width = 1, weight.group_size or magnitudes.shape[1]
    tall = np.maximum.reduceat(magnitudes, range(0, magnitudes.shape[0], height), axis=0)
    spans = np.maximum.reduceat(tall, range(0, magnitudes.shape[1], width), axis=1)
    values = spans.view(E4M3) if weight.codes.dtype == E4M3 else spans
    return values.astype(np.float32)
