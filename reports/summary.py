"""The numbers of one variant, joined from all files: accuracy, speed against the baseline, size, parity, meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quantbench.reports import files
from quantbench.reports.formatting import join
from quantbench.reports.gather import Run

_FORMAT = {
    "int8": "INT8",
    "int4": "INT4",
    "fp8_e4m3": "FP8",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
_FLOATS = ("float32", "bfloat16", "float16")
_DYNAMIC = "_dynamic"  # behind the format of a cache
_PER = {"tensor": "tensor", "channel": "output channel", "block": "128x128 block", "head": "KV head"}


def variant_record(run: Run, variant: str, baseline: str | None) -> dict[str, Any]:
    """Everything report.json says about a variant but its layers, gates and findings."""
    planned = run.plan.variants.get(variant) if run.plan else None
    speed = run.throughput.variants.get(variant) if run.throughput else None
    meaning = words(planned) if planned else {"text": f"the model as it came, run as {variant}"}
    return {
        "mode": planned.mode_name if planned else variant,
        "baseline": variant == baseline,
        "quantized": variant in run.scales or bool(planned and _quantized(planned)),
        "meaning": meaning,
        "size": sizes(run, variant),
        "accuracy": accuracy(run, variant),
        "speed": speeds(speed, run.throughput.variants.get(baseline or "") if run.throughput else None),
        "parity": parity(run, variant),
    }


def words(planned: files.PlannedVariant) -> dict[str, str]:
    """What the variant does to weights, activations and cache, each in a few words, and joined as `text`."""
    kinds = Counter(_weight_words(layer) for layer in planned.layers.values() if layer.weights not in _FLOATS)
    dtype = _FORMAT.get(planned.dtype, planned.dtype)
    told = {
        "weights": kinds.most_common(1)[0][0] if kinds else f"{dtype} weights",
        "activations": _activation_words(planned, dtype),
        "cache": _cache_words(planned.cache),
    }
    if planned.transforms:
        told["transforms"] = "after " + join([_transform_words(t) for t in planned.transforms])
    if planned.prefix != "off":
        told["prefix"] = f"behind a prefix ({planned.prefix})"
    kept = sum(layer.weights in _FLOATS for layer in planned.layers.values())
    if kinds and kept:
        told["kept"] = f"{kept} of {len(planned.layers)} linears stay {dtype}"
    return told | {"text": ", ".join(told.values())}


def _quantized(planned: files.PlannedVariant) -> bool:
    cache = str(planned.cache.get("format", "float32"))
    return cache not in _FLOATS or any(layer.weights not in _FLOATS for layer in planned.layers.values())


def _weight_words(layer: files.PlannedLayer) -> str:
    per = (
        f"group of {layer.group_size}" if layer.granularity == "group" else _PER.get(layer.granularity or "", "tensor")
    )
    method = "" if layer.method == "rtn" else f" by {layer.method}"
    return f"{_FORMAT.get(layer.weights, layer.weights)} weights per {per}{method}"


def _activation_words(planned: files.PlannedVariant, dtype: str) -> str:
    kinds = Counter(
        f"{_FORMAT.get(layer.activations, layer.activations)} inputs, "
        + ("dynamic per token" if layer.dynamic else "static per tensor")
        for layer in planned.layers.values()
        if layer.activations is not None
    )
    return kinds.most_common(1)[0][0] if kinds else f"{dtype} inputs"


def _cache_words(cache: Mapping[str, Any]) -> str:
    held = str(cache.get("format", "float32"))
    name = held.removesuffix(_DYNAMIC)
    per = "token and KV head" if held != name else _PER.get(str(cache.get("granularity", "head")), "head")
    return f"{_FORMAT.get(name, name)} KV cache" + ("" if name in _FLOATS else f" per {per}")


def _transform_words(transform: Mapping[str, Any]) -> str:
    (name, settings), *_ = transform.items()
    told = ", ".join(f"{key} {value}" for key, value in settings.items()) if isinstance(settings, Mapping) else ""
    return f"{name} ({told})" if told else name


def sizes(run: Run, variant: str) -> dict[str, Any]:
    """Bytes. `fp32_bytes` is the fp32 variant's checkpoint, or twice a 16-bit one's where no fp32 was run."""
    speed = run.throughput.variants.get(variant) if run.throughput else None
    kinds = run.weights_by_kind.get(variant, {})
    checkpoint = _checkpoint_bytes(run, variant)
    full = _fp32_bytes(run)
    return {
        "checkpoint_bytes": checkpoint,
        "ratio_to_fp32": checkpoint / full if checkpoint and full else None,
        "weights_bytes": speed.weights_bytes if speed else None,
        "cache_bytes": speed.cache_bytes if speed else None,
        "peak_rss_bytes": speed.peak_rss_bytes if speed else None,
        "by_kind": kinds,
    }


def _fp32_bytes(run: Run) -> float | None:
    sizes = ((_checkpoint_bytes(run, mode), factor) for mode, factor in (("fp32", 1), ("bf16", 2), ("fp16", 2)))
    return next((float(count * factor) for count, factor in sizes if count), None)


def _checkpoint_bytes(run: Run, variant: str) -> int | None:
    """As the throughput stage found it, else the sum of the tensors on disk."""
    speed = run.throughput.variants.get(variant) if run.throughput else None
    if speed is not None and speed.checkpoint_bytes:
        return speed.checkpoint_bytes
    return sum(run.weights_by_kind.get(variant, {}).values()) or None


def accuracy(run: Run, variant: str) -> dict[str, list[dict[str, Any]]]:
    """{perplexity, divergence, choices}: one record per data set that this variant was scored on."""
    scored = run.accuracy
    groups: dict[str, list[Any]] = {
        "perplexity": scored.perplexity if scored else [],
        "divergence": scored.divergence if scored else [],
        "choices": scored.choices if scored else [],
    }
    return {
        name: [
            measure.model_dump(exclude={"variants"}) | measure.variants[variant].model_dump()
            for measure in group
            if variant in measure.variants
        ]
        for name, group in groups.items()
    }


def speeds(speed: files.Speed | None, baseline: files.Speed | None) -> dict[str, Any]:
    """Prefill and decode per batch, each with its median `speedup` over the baseline and that one's `speedup_range`."""
    if speed is None:
        return {"load_s": None, "prefill": None, "decode": {}}
    prefill = _paced(speed.prefill, baseline.prefill if baseline else None)
    decode = {
        batch: _paced(measured, baseline.decode.get(batch) if baseline else None)
        for batch, measured in sorted(speed.decode.items(), key=lambda item: int(item[0]))
    }
    return {"load_s": speed.load_s, "prefill": prefill, "decode": decode}


def _paced(measured: files.Prefill | files.Decode | None, base: files.Prefill | files.Decode | None) -> Any:
    if measured is None:
        return None
    record = measured.model_dump()
    if measured.speedup is not None:
        return record | {
            "speedup": measured.speedup.median,
            "speedup_range": [measured.speedup.min, measured.speedup.max],
        }
    reference = base.tokens_per_s.median if base else 0.0
    speedup = measured.tokens_per_s.median / reference if reference > 0 else None
    return record | {"speedup": speedup, "speedup_range": None}


def parity(run: Run, variant: str) -> dict[str, Any] | None:
    if run.parity is None or variant not in run.parity.variants:
        return None
    return {"tokens": run.parity.tokens} | run.parity.variants[variant].model_dump()
