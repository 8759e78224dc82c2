"""A cache with a scale per token and head on the GPU, against the numpy reference: writing, reading, pages."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.cuda import attention, rows
from quantbench.infer.cuda.cache import Pages
from quantbench.infer.cuda.device import Device
from quantbench.infer.engine.cache import KVCache
from quantbench.infer.models import ModelConfig
from quantbench.infer.ops import ActSpec, Batch, LayerCache

from .test_attention import BF16, E4M3, REFERENCE, assert_close, on_device, problem, run

SHAPES = [(64, (9, 3)), (128, (8, 2)), (80, (4, 4)), (256, (4, 1))]


def dynamic(cache: LayerCache) -> LayerCache:
    """Its pages under scales that differ by a factor of 8,000 from token to token."""
    rng = np.random.default_rng(0)
    most = 127 if cache.k.dtype == np.int8 else 448
    scales = (np.exp(rng.uniform(-9, 0, cache.k.shape[:3])).astype(np.float32) / most for _ in "kv")
    return LayerCache(cache.k, cache.v, *scales)


def writing(batch: Batch) -> Batch:
    """The batch with a place for each of its tokens, the newest of their sequences."""
    lengths = np.diff(batch.starts)
    places = [
        (s, p) for s, (n, count) in enumerate(zip(lengths, batch.context, strict=True)) for p in range(count - n, count)
    ]
    slots = [int(batch.tables[s, p // 64]) * 64 + p % 64 for s, p in places]
    return replace(batch, positions=np.array([p for _, p in places], np.int32), slots=np.array(slots, np.int64))


def angles(size: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.random.default_rng(size).uniform(0, 6, (800, size // 2)).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def copy_of(cache: LayerCache) -> LayerCache:
    return LayerCache(*(array.copy() for array in cache.arrays))


@pytest.mark.parametrize("dtype", [np.int8, E4M3])
@pytest.mark.parametrize(("size", "heads"), SHAPES)
@pytest.mark.parametrize(("new", "contexts"), [([1, 1, 1], [300, 64, 1]), ([100, 1, 7], [164, 70, 7])])
def test_attention(
    device: Device, new: list[int], contexts: list[int], size: int, heads: tuple[int, int], dtype: Any
) -> None:
    q, batch, cache = problem(new, contexts, heads, size, dtype)
    q = q.astype(BF16).astype(np.float32)
    want = REFERENCE.attention(q, batch, dynamic(cache))
    assert_close(run(device, q, batch, dynamic(cache)), want, 2e-5)


@pytest.mark.parametrize("dtype", [np.int8, E4M3])
@pytest.mark.parametrize(("size", "heads"), SHAPES)
@pytest.mark.parametrize(("new", "contexts"), [([1, 1, 1], [300, 64, 1]), ([100, 1, 7], [164, 70, 7])])
def test_attention_on_tensor_cores(
    device_bf16: Device, new: list[int], contexts: list[int], size: int, heads: tuple[int, int], dtype: Any
) -> None:
    q, batch, cache = problem(new, contexts, heads, size, dtype)
    q = q.astype(BF16).astype(np.float32)
    for window in (None, 50):
        want = REFERENCE.attention(q, batch, dynamic(cache), window)
        assert_close(run(device_bf16, q, batch, dynamic(cache), window), want, 8e-3)


@pytest.mark.parametrize("dtype", [np.int8, E4M3])
@pytest.mark.parametrize(("size", "heads"), SHAPES)
def test_writing_takes_the_scale_of_each_head(device: Device, size: int, heads: tuple[int, int], dtype: Any) -> None:
    """Bit for bit, of rows of zeros, of outliers and of values whose scale would be subnormal too."""
    _, batch, cache = problem([5, 1], [70, 64], heads, size, dtype)
    batch, held = writing(batch), dynamic(cache)
    qkv = np.random.default_rng(1).standard_normal((6, (heads[0] + 2 * heads[1]) * size)).astype(np.float32)
    qkv[1], qkv[2, ::size], qkv[3] = 0, 1e5, 1e-38
    lent, pages = on_device(device, batch, held)
    rope: Any = tuple(device.upload(r) for r in angles(size))
    rows.rope_write(device, device.upload(qkv), lent, rope, None, 1e-6, pages)
    REFERENCE.rope_write(qkv, batch, angles(size), None, 1e-6, held)
    for ours, theirs in zip(pages.arrays, held.arrays, strict=True):
        np.testing.assert_array_equal(device.fetch(ours).view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_scale_nan(device: Device, bad: float) -> None:
    _, batch, cache = problem([2], [2], (2, 2), 64, np.int8)
    batch, held = writing(batch), dynamic(cache)
    qkv = np.ones((2, 6 * 64), np.float32)
    qkv[1, 4 * 64 + 5] = bad  # of V's first head
    lent, pages = on_device(device, batch, held)
    rope: Any = tuple(device.upload(r) for r in angles(64))
    rows.rope_write(device, device.upload(qkv), lent, rope, None, 1e-6, pages)
    k_scale, v_scale = (device.fetch(array) for array in pages.arrays[2:])
    assert np.isnan(v_scale).sum() == 1
    assert np.isnan(v_scale[batch.slots[1] // 64, 0, batch.slots[1] % 64])
    assert not np.isnan(k_scale).any()


@pytest.mark.parametrize("dtype", [np.int8, E4M3])
@pytest.mark.parametrize(("size", "heads"), SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_a_fused_decode_step(device_bf16: Device, normed: bool, size: int, heads: tuple[int, int], dtype: Any) -> None:
    """RoPE, append and attention in one kernel: what it writes and what comes out, with splits and without."""
    device, contexts = device_bf16, [1, 64, 65, 777, 130]
    _, batch, cache = problem([1] * 5, contexts, heads, size, dtype)
    batch, held = writing(batch), dynamic(cache)
    rng = np.random.default_rng(size)
    qkv = rng.standard_normal((5, (heads[0] + 2 * heads[1]) * size)).astype(BF16).astype(np.float32)
    norms: Any = tuple(rng.uniform(0.5, 2, size).astype(np.float32) for _ in "qk") if normed else None
    rope: Any = tuple(device.upload(r) for r in angles(size))
    weights: Any = norms and tuple(device.upload(n) for n in norms)
    lent, pages = on_device(device, batch, held)
    given = device.upload(qkv.astype(BF16))
    got = attention.decode_attention(device, given, lent, rope, weights, 1e-6, pages, None, ActSpec())
    q = REFERENCE.rope_write(qkv, batch, angles(size), norms, 1e-6, held)
    assert_close(device.fetch(cast(Any, got.values)).astype(np.float32), REFERENCE.attention(q, batch, held), 1e-2)
    for ours, theirs in zip(pages.arrays, held.arrays, strict=True):
        here, there = device.fetch(ours).astype(np.float32), theirs.astype(np.float32)
        if ours.dtype == np.float32:
            np.testing.assert_allclose(here, there, rtol=1e-6)
        else:
            assert (here != there).mean() < 1e-3


def test_pages_copy_and_begin_with_their_scales(device: Device) -> None:
    config = cast(ModelConfig, SimpleNamespace(num_layers=2, num_kv_heads=2, head_dim=16))
    k, v = np.random.default_rng(0).standard_normal((2, 2, 2, 70, 16)).astype(np.float32)
    host = KVCache(config, "int8_dynamic", 256, [None] * 2, Prefix(tuple(range(70)), k, v))
    pages = Pages(device, host)
    host.begin([3, 1])
    pages.begin([3, 1])
    pages.copy(1, 0)
    for here, there in zip(pages.layers, host.layers, strict=True):
        for ours, theirs in zip(here.arrays, there.arrays, strict=True):
            fetched = device.fetch(ours)
            np.testing.assert_array_equal(fetched[[3, 1]], theirs[[3, 1]])
            np.testing.assert_array_equal(fetched[0], theirs[1])
            assert theirs[3].any()
