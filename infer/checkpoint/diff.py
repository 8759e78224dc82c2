"""What differs between two models: plans of linears first, then tensors, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.scales.diff import Difference

_WORDS = ("weights", "granularity", "group_size", "symmetric", "activations", "dynamic")


def diff_checkpoints(a: str | Path, b: str | Path) -> list[Difference]:
    """Differences from a to b; empty where both hold the same plans and values. Raises what `open_model` raises."""
    before, after = open_model(a), open_model(b)
    found = [*_plans(before, after), *_cache(before, after)]
    for name in sorted(set(before.names()) | set(after.names())):
        found += _tensor(before, after, name)
    return found


def _plans(a: ModelSource, b: ModelSource) -> Iterator[Difference]:
    old, new = ({} if s.quantization is None else s.quantization.layers for s in (a, b))
    for name in sorted(set(old) | set(new)):
        before, after = (asdict(plans[name]) if name in plans else {} for plans in (old, new))
        for word in _WORDS:
            if before.get(word) != after.get(word):
                yield Difference(name, word, str(before.get(word)), str(after.get(word)))


def _cache(a: ModelSource, b: ModelSource) -> Iterator[Difference]:
    old, new = (s.quantization.cache.format if s.quantization and s.quantization.cache else "float" for s in (a, b))
    if old != new:
        yield Difference("kv_cache", "format", old, new)


def _tensor(a: ModelSource, b: ModelSource, name: str) -> Iterator[Difference]:
    stored = [name in s.names() for s in (a, b)]
    if not all(stored):
        old, new = ("present" if there else "absent" for there in stored)
        yield Difference(name, "entry", old, new)
        return
    for field, old, new in (
        ("shape", str(list(a.store.shape(name))), str(list(b.store.shape(name)))),
        ("dtype", a.store.dtype(name).name, b.store.dtype(name).name),
    ):
        if old != new:
            yield Difference(name, field, old, new)
            return
    x, y = (np.asarray(s.read(name)) for s in (a, b))
    changed = x.view(np.uint8).reshape(-1) != y.view(np.uint8).reshape(-1)
    if changed.any():
        elements = int((changed.reshape(-1, x.dtype.itemsize)).any(axis=1).sum())
        before, after = x.astype(np.float64), y.astype(np.float64)
        largest = float(np.abs(after - before).max() / max(float(np.abs(before).max()), np.finfo(np.float32).tiny))
        yield Difference(name, "values", f"{x.size} values", f"{elements} of them changed", largest)
