"""Attention over the paged cache on the GPU against the numpy reference: every cache format, head size and shape."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.cuda import attention, prefill
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.ops import ActSpec, Batch, LayerCache
from quantbench.infer.ops.reference import ReferenceOps

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
REFERENCE = ReferenceOps()
CACHES = [np.float32, BF16, np.float16, np.int8, E4M3]


def pages_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if dtype == np.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return (rng.standard_normal(shape) * (50 if dtype == E4M3 else 1)).astype(dtype)


def problem(
    rows: list[int], contexts: list[int], heads: tuple[int, int], size: int, dtype: Any
) -> tuple[np.ndarray, Batch, LayerCache]:
    """Queries, a batch of sequences with `rows` new tokens each, and a cache whose pages are scattered."""
    rng = np.random.default_rng(size + sum(contexts))
    counts = [-(-c // 64) for c in contexts]
    order = rng.permutation(sum(counts) + 2)
    tables = np.full((len(rows), max(counts) + 1), 0, np.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = order[sum(counts[:s]) : sum(counts[: s + 1])]
    shape = (sum(counts) + 2, heads[1], 64, size)
    scale = rng.uniform(0.005, 0.02, (2, heads[1])).astype(np.float32)
    if np.dtype(dtype).itemsize > 1:
        scale[:] = 1
    cache = LayerCache(pages_of(rng, shape, dtype), pages_of(rng, shape, dtype), scale[0], scale[1])
    starts = np.cumsum([0, *rows]).astype(np.int32)
    q = rng.standard_normal((int(starts[-1]), heads[0] * size)).astype(np.float32) * 2
    none = np.zeros(int(starts[-1]), np.int32)
    return q, Batch(none, none, none.astype(np.int64), starts, np.array(contexts, np.int32), tables), cache


def on_device(device: Device, batch: Batch, cache: LayerCache) -> tuple[DeviceBatch, DeviceCache]:
    indices = (batch.ids, batch.positions, batch.slots, batch.starts, batch.context, batch.tables)
    rows = np.diff(batch.starts)
    lent = DeviceBatch(
        *(device.upload(a) for a in indices),
        decode=bool(np.all(rows == 1)),
        max_context=int(batch.context.max()),
        max_rows=int(rows.max()),
        lengths=rows,
        contexts=batch.context,
    )
    return lent, DeviceCache(*(device.upload(a) for a in (cache.k, cache.v, cache.k_scale, cache.v_scale)))


def run(device: Device, q: np.ndarray, batch: Batch, cache: LayerCache, window: int | None = None) -> np.ndarray:
    lent, pages = on_device(device, batch, cache)
    out = attention.attention(device, device.upload(q.astype(device.dtype)), lent, pages, window)
    return device.fetch(out).astype(np.float32)


def assert_close(got: np.ndarray, want: np.ndarray, close: float) -> None:
    wrong = ~(np.abs(got - want) <= close * (np.abs(want) + np.abs(want).max()))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong: rows {np.unique(np.nonzero(wrong)[0])[:20]}, columns "
        f"{np.unique(np.nonzero(wrong)[1])[:40]}; got {got[wrong][:4]} want {want[wrong][:4]}"
    )


@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", CACHES)
def test_float32_follows_the_reference(device: Device, size: int, dtype: Any) -> None:
    q, batch, cache = problem([1, 5, 70], [200, 5, 150], (6, 2), size, dtype)
    assert_close(run(device, q, batch, cache), REFERENCE.attention(q, batch, cache), 3e-6)


@pytest.mark.parametrize("window", [1, 3, 64, 100])
@pytest.mark.parametrize("decode", [False, True])
def test_window_in_float32(device: Device, window: int, decode: bool) -> None:
    q, batch, cache = problem([1, 1] if decode else [70, 2], [130, 64] if decode else [150, 2], (4, 4), 64, np.int8)
    assert_close(run(device, q, batch, cache, window), REFERENCE.attention(q, batch, cache, window), 3e-6)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_decode_on_tensor_cores(device_bf16: Device, size: int, dtype: Any) -> None:
    q, batch, cache = problem([1] * 5, [1, 64, 65, 777, 130], (6, 2), size, dtype)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (8, 1), (14, 2), (32, 8), (24, 2)])
def test_decode_with_any_group_of_heads(device_bf16: Device, heads: tuple[int, int]) -> None:
    q, batch, cache = problem([1, 1, 1], [300, 9, 4], heads, 64, np.int8)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


@pytest.mark.parametrize("contexts", [[5000], [4096, 1], [64 * 17 + 5] * 40])
@pytest.mark.parametrize("dtype", [BF16, np.int8])
def test_decode_over_long_contexts(device_bf16: Device, contexts: list[int], dtype: Any) -> None:
    q, batch, cache = problem([1] * len(contexts), contexts, (8, 2), 128, dtype)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


@pytest.mark.parametrize("window", [1, 3, 64, 100])
@pytest.mark.parametrize("decode", [False, True])
def test_window_on_tensor_cores(device_bf16: Device, window: int, decode: bool) -> None:
    q, batch, cache = problem([1, 1] if decode else [70, 2], [230, 64] if decode else [150, 2], (4, 2), 64, np.int8)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache, window), REFERENCE.attention(q, batch, cache, window), 6e-3)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_prefill_on_tensor_cores(device_bf16: Device, size: int, dtype: Any) -> None:
    q, batch, cache = problem([3, 130, 64, 1], [3, 130, 200, 77], (6, 2), size, dtype)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 2), (14, 2), (12, 1)])
@pytest.mark.parametrize("window", [None, 3, 64, 200])
@pytest.mark.parametrize("dtype", [BF16, np.int8])
def test_prefill_of_chunks_with_any_group_and_window(
    device_bf16: Device, heads: tuple[int, int], window: int | None, dtype: Any
) -> None:
    q, batch, cache = problem([100, 2, 333, 1], [500, 2, 700, 90], heads, 128, dtype)
    q = q.astype(BF16).astype(np.float32)
    got = run(device_bf16, q, batch, cache, window)
    assert_close(got, REFERENCE.attention(q, batch, cache, window), 6e-3)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_prefill_of_more_tiles_than_blocks(device_bf16: Device, size: int, dtype: Any) -> None:
    q, batch, cache = problem([65, 3, 64, 33] * 12, [65, 3, 64, 200] * 12, (8, 4), size, dtype)
    q = q.astype(BF16).astype(np.float32)
    assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


def test_sharp_scores_and_large_values(device_bf16: Device) -> None:
    for rows, contexts in (([1, 1], [500, 64]), ([100], [500])):
        q, batch, cache = problem(rows, contexts, (4, 2), 128, BF16)
        q = (q * 20).astype(BF16).astype(np.float32)
        cache.v[:] = (cache.v.astype(np.float32) * 1e4).astype(BF16)
        assert_close(run(device_bf16, q, batch, cache), REFERENCE.attention(q, batch, cache), 6e-3)


def test_a_padded_sequence_gives_zeros(device: Device, device_bf16: Device) -> None:
    for one in (device_bf16, device):
        q, batch, cache = problem([1, 1], [100, 64], (4, 2), 64, np.int8)
        batch.context[1] = 0
        got = run(one, q, batch, cache)
        assert np.all(got[1] == 0)
        assert np.all(np.isfinite(got[0]))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("decode", [False, True])
def test_scales_of_each_token_and_head(device_bf16: Device, decode: bool, size: int) -> None:
    """A cache with one scale per token and head equals the same values in float16."""
    rows, contexts = ([1, 1], [300, 64]) if decode else ([100, 7], [464, 7])
    q, batch, cache = problem(rows, contexts, (4, 2), size, np.int8)
    q = q.astype(BF16).astype(np.float32)
    rng = np.random.default_rng(0)
    scales = [np.exp(rng.uniform(-9, 0, cache.k.shape[:3])).astype(np.float32) / 127 for _ in "kv"]
    want = LayerCache(
        *((c * s[..., None]).astype(np.float32) for c, s in zip((cache.k, cache.v), scales, strict=True)),
        *np.ones((2, 2), np.float32),
    )
    got = run(device_bf16, q, batch, LayerCache(cache.k, cache.v, scales[0], scales[1]))
    assert_close(got, REFERENCE.attention(q, batch, want), 6e-3)


@pytest.mark.parametrize("dtype", CACHES[1:])
@pytest.mark.parametrize(
    ("size", "heads", "normed"),
    [(64, (9, 3), False), (128, (8, 2), True), (80, (4, 4), True), (256, (4, 1), False)],
)
def test_a_fused_decode_step_equals_its_parts(
    device_bf16: Device, size: int, heads: tuple[int, int], normed: bool, dtype: Any
) -> None:
    """RoPE, append and attention in one kernel against the reference's two operations; the pages too."""
    device, rng = device_bf16, np.random.default_rng(size)
    contexts = [1, 64, 65, 777, 130]
    _, batch, cache = problem([1] * len(contexts), contexts, heads, size, dtype)
    newest = np.array(contexts) - 1
    batch.positions = newest.astype(np.int32)
    batch.slots = np.array([batch.tables[s, n // 64] * 64 + n % 64 for s, n in enumerate(newest)], np.int64)
    qkv = rng.standard_normal((len(contexts), (heads[0] + 2 * heads[1]) * size)).astype(BF16).astype(np.float32)
    angle = rng.uniform(0, 6, (800, size // 2)).astype(np.float32)
    norms: Any = tuple(rng.uniform(0.5, 2, size).astype(np.float32) for _ in "qk") if normed else None
    rope = np.cos(angle), np.sin(angle)
    lent, pages = on_device(device, batch, cache)
    tables: Any = tuple(device.upload(r) for r in rope)
    weights: Any = norms and tuple(device.upload(n) for n in norms)
    assert attention.fuses_decode(device, lent, pages)
    given = device.upload(qkv.astype(BF16))
    for spec in (ActSpec(), ActSpec("int8"), ActSpec("fp8_e4m3", 0.01)):
        got = attention.decode_attention(device, given, lent, tables, weights, 1e-6, pages, None, spec)
        q = REFERENCE.rope_write(qkv, batch, rope, norms, 1e-6, cache)
        want = REFERENCE.attention(q, batch, cache)
        held: Any = got.values if got.codes is None else got.codes
        values = device.fetch(held).astype(np.float32)
        if got.codes is not None:
            values = values * device.fetch(got.scale)[:, None]  # type: ignore[arg-type, index]
        assert_close(values, want, 8e-3 if got.codes is None else 4e-2)
    for here, there in ((pages.k, cache.k), (pages.v, cache.v)):
        different = device.fetch(here).astype(np.float32) != there.astype(np.float32)
        assert different.mean() < 1e-3, f"pages differ at {np.argwhere(different)[:5]}"


def test_tiles_cover_every_row_of_prompts_once_the_longest_first() -> None:
    lengths, contexts = np.array([3, 1, 70, 2]), np.array([3, 90, 500, 64])
    tiles = prefill.tiles_of(lengths, contexts, 32)
    assert tiles.tolist() == [[2, 68, 6, 494], [2, 36, 38, 462], [2, 4, 70, 430], [3, 74, 2, 62], [0, 0, 3, 0]]
    assert len(prefill.tiles_of(lengths, contexts, 3)) == 1 + 24 + 1


def test_splits_fill_the_gpu() -> None:
    assert attention.splits_for(pages=17, blocks=8, slots=528) == 17
    assert attention.splits_for(pages=17, blocks=256, slots=528) == 2
    assert attention.splits_for(pages=17, blocks=2048, slots=528) == 1
    assert attention.splits_for(pages=1, blocks=1, slots=528) == 1
    assert attention.splits_for(pages=4000, blocks=8, slots=528) <= attention.SPLITS
