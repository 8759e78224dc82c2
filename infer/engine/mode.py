"""Which mode a model is loaded in: its own, or for a float source any mode that needs no calibration."""

from __future__ import annotations

from collections import Counter

from quantbench.errors import RequestError, unknown
from quantbench.infer.checkpoint.source import EMBEDDING, ModelSource, Quantization
from quantbench.vocabulary import DYNAMIC, MODES, Mode


def stored_mode(source: ModelSource) -> Mode:
    """The mode a source is stored in: what its tensors read as (a GGUF file's as float32, whatever its blocks hold).
    A mixed checkpoint is called after what most of its linears are."""
    if source.quantization is None:
        dtype = source.store.dtype(EMBEDDING).name
        return next(m for m in MODES.values() if (m.weights, m.cache) == (dtype, dtype))
    weights, activations, cache = _majority(source.quantization, source.config.dtype)
    for mode in MODES.values():
        if (mode.weights, mode.activations, mode.cache) == (weights, activations, cache):
            return mode
    return Mode(f"{weights}-{activations or 'float'}-{cache}", weights, activations, cache)


def _majority(quantization: Quantization, dtype: str) -> tuple[str, str | None, str]:
    kinds = Counter((plan.weights, plan.activations) for plan in quantization.layers.values())
    weights, activations = kinds.most_common(1)[0][0] if kinds else (dtype, None)
    float_cache = dtype if weights == dtype else "bfloat16"
    return weights, activations, quantization.cache.format if quantization.cache else float_cache


def resolve_mode(source: ModelSource, name: str | None) -> tuple[Mode, bool]:
    """The mode to run in, and whether weights must be converted to it.

    Raises RequestError for an unknown name, another mode than a quantized checkpoint's own, and a quantized cache
    without calibrated scales.
    """
    stored = stored_mode(source)
    if name is None or (name == stored.name and source.quantization is not None):
        return stored, False
    if name not in MODES:
        raise RequestError(unknown("mode", name, MODES))
    if source.quantization is not None:
        raise RequestError(
            f"{source.name}: mode {name!r} asked of a checkpoint that is stored as {stored.name!r}; "
            f"leave the mode out, or load the float model it was made from"
        )
    mode = MODES[name]
    if mode.calibrates_cache:
        raise RequestError(
            f"{source.name}: mode {name!r} holds the KV cache in {mode.cache} with calibrated scales, which a float "
            f"model does not have; run `quantbench calibrate` with this mode and load its checkpoint, or take "
            f"{name + DYNAMIC!r}, whose scales are found per token"
        )
    return mode, True
