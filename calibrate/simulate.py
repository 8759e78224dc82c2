"""What a quantized model computes, by Paddle: dequantized weights, and taps that are quantized and dequantized.

This shares no arithmetic with the runtime but the formats' reference in quantizers/, so it is what parity compares
the served logits with: if both agree, the kernels did what calibration decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from quantbench.calibrate.forward import HEAD_TAP, BlockForward, Float, Int
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import LinearWeight, ModelSource
from quantbench.infer.engine.mode import stored_mode
from quantbench.infer.engine.trace import Tap, Trace
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.quantizers.activation import quantize_activation, quantize_heads
from quantbench.quantizers.formats import FORMATS
from quantbench.vocabulary import DYNAMIC

_FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class InputFormat:
    """How a linear's input is quantized: `scale` static, or None for one scale per token. A bf16 weight multiplies
    inputs rounded to bf16 (`format` "bfloat16", no scale)."""

    format: str
    scale: float | None


@dataclass(frozen=True)
class CacheFormat:
    """How K and V are held: one of CACHE_FORMATS, where it has static scales with those of each KV head, f32[KV]."""

    format: str
    k_scale: Float | None = None
    v_scale: Float | None = None

    def hold(self, tap: str, x: Float) -> Tap:
        """K or V f32[T, KV, d] (`tap` "k" or "v") as the cache holds it: values as they are read, codes and scale."""
        if self.format in _FLOATS:
            return Tap(x.astype(_FLOATS[self.format]).astype(np.float32))
        if self.format.endswith(DYNAMIC):
            name = self.format.removesuffix(DYNAMIC)
            codes, found = quantize_heads(x, name)
            return Tap(FORMATS[name].decode(codes, found[..., None]), codes, found)
        scale = self.k_scale if tap == "k" else self.v_scale
        assert scale is not None
        record = FORMATS[self.format]
        codes = record.encode(x, scale[:, None])
        return Tap(record.decode(codes, scale[:, None]), codes, scale)


@dataclass
class FakeQuantize:
    """A tap hook: replaces the taps in `inputs` (taps or single linears) and K and V by what quantization leaves.

    With `record`, every call's tap is kept there (float input, codes and scale; K and V decoded, as they are read).
    """

    inputs: Mapping[str, InputFormat]
    cache: CacheFormat
    record: dict[str, Tap] | None = None
    _shared: frozenset[str] = field(default=frozenset((*(line.tap for line in LINEARS), HEAD_TAP)), repr=False)

    def __call__(self, tap: str, x: Float) -> Float | None:
        if tap in ("k", "v"):
            held = self.cache.hold(tap, x)
            self._keep(tap, held)
            return held.values
        spec = self.inputs.get(tap)
        if spec is None or spec.format in _FLOATS:
            if tap in self._shared:
                self._keep(tap, Tap(x.copy()) if self.record is not None else None)
            return None if spec is None else x.astype(_FLOATS[spec.format]).astype(np.float32)
        codes, scale = quantize_activation(x, spec.format, spec.scale)
        self._keep(tap, Tap(x.copy(), codes, scale) if self.record is not None else None)
        return FORMATS[spec.format].decode(codes, scale if spec.scale is not None else scale[:, None])

    def _keep(self, tap: str, seen: Tap | None) -> None:
        if self.record is not None and seen is not None:
            self.record[tap] = seen


def quantized_block(source: ModelSource, layer: int, cache: str | None = None) -> tuple[dict[str, Float], FakeQuantize]:
    """Weights of one block as they act (dequantized, f32, by name within the block) and the hook for its taps.

    `cache` overrides the format of a float KV cache ("float32" to simulate a bf16 model run in fp32).
    """
    linears = {line.name: source.linear(f"{block_prefix(layer)}.{line.name}") for line in LINEARS}
    inputs = _inputs(linears, rounded=cache is None)
    return source.float_block(layer), FakeQuantize(inputs, _cache_format(source, layer, cache))


def simulate(
    source: ModelSource,
    ids: Sequence[int] | Int,
    *,
    forward: BlockForward | None = None,
    taps: bool = True,
    cache: str | None = None,
    followed: Sequence[Float] | None = None,
) -> Trace:
    """One window of T token ids through a source as it is stored (float or quantized).

    The trace has the hidden state after every block f32[T, D], the logits f32[T, V] and, with `taps`, what every tap
    saw. `forward` may be shared between windows of one source. `followed`: hidden states after every block of another
    run; block n then starts from followed[n - 1] instead of from its own, so that every block is compared on
    identical inputs. Rounding makes a free-running comparison chaotic: one code that falls to the other side of an
    edge moves later values, which move later codes, until two correct runs differ by as much as quantization costs.
    The window stands behind the source's prefix, where it has one, as in the engine.
    """
    forward = (forward or PaddleForward.of(source)).behind(held_prefix(source, cache))
    window = np.asarray(ids, np.int32)[None, :]
    lengths = np.array([window.shape[1]], np.int32)
    trace = Trace()
    hidden = forward.embed(window)
    for layer in range(source.config.num_layers):
        weights, hook = quantized_block(source, layer, cache)
        hook.record = {} if taps else None
        forward.load(layer, weights)
        hidden = forward.run(hidden, lengths, hook, (*hook.inputs, *_RECORDED))
        trace.hidden.append(hidden[0].copy())
        trace.taps |= {f"{block_prefix(layer)}.{name}": tap for name, tap in (hook.record or {}).items()}
        if followed is not None and layer + 1 < source.config.num_layers:
            hidden = followed[layer][None]
    head = FakeQuantize(_head_input(source, rounded=cache is None), CacheFormat("float32"), {} if taps else None)
    trace.logits = forward.head(hidden[0], head)
    trace.taps |= head.record or {}
    return trace


def held_prefix(source: ModelSource, cache: str | None = None) -> Prefix | None:
    """The source's prefix as its KV cache holds it; `cache` as in `quantized_block`."""
    if source.prefix is None:
        return None
    formats = [_cache_format(source, layer, cache) for layer in range(source.config.num_layers)]
    k, v = (
        np.stack(
            [f.hold(tap, x.transpose(1, 0, 2)).values.transpose(1, 0, 2) for f, x in zip(formats, heads, strict=True)]
        )
        for tap, heads in (("k", source.prefix.k), ("v", source.prefix.v))
    )
    return replace(source.prefix, k=k, v=v)


_RECORDED = (*dict.fromkeys(line.tap for line in LINEARS), "k", "v")


def _inputs(linears: Mapping[str, LinearWeight], rounded: bool) -> dict[str, InputFormat]:
    """By tap where all its linears agree, else by linear. `rounded`: bf16 weights are multiplied as bf16."""
    specs = {line.name: _input_format(linears[line.name], rounded) for line in LINEARS}
    found: dict[str, InputFormat] = {}
    for tap in dict.fromkeys(line.tap for line in LINEARS):
        names = [line.name for line in LINEARS if line.tap == tap]
        alike = len({specs[name] for name in names}) == 1
        for key, spec in {tap: specs[names[0]]}.items() if alike else ((n, specs[n]) for n in names):
            if spec is not None:
                found[key] = spec
    return found


def _input_format(linear: LinearWeight, rounded: bool) -> InputFormat | None:
    if linear.activations is not None:
        return InputFormat(linear.activations, linear.input_scale)
    bf16 = isinstance(linear.weight, np.ndarray) and linear.weight.dtype == _FLOATS["bfloat16"]
    return InputFormat("bfloat16", None) if bf16 and rounded else None


def _head_input(source: ModelSource, rounded: bool) -> dict[str, InputFormat]:
    spec = _input_format(source.linear(HEAD_TAP), rounded)
    return {} if spec is None else {HEAD_TAP: spec}


def _cache_format(source: ModelSource, layer: int, override: str | None) -> CacheFormat:
    cache = source.quantization.cache if source.quantization else None
    if cache is None:
        return CacheFormat(override or stored_mode(source).cache)
    return CacheFormat(cache.format, *(source.cache_scales(layer) or ()))
