"""RoPE with cache write, and attention over pages, against the numpy reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.infer.ops import PAGE, Batch, LayerCache
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.ops.reference import ReferenceOps

E4M3 = ml_dtypes.float8_e4m3fn
STATIC = [(dtype, False) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16, np.int8, E4M3)]
CACHES = [*STATIC, (np.int8, True), (E4M3, True)]  # dtype of the pages, and whether their scales are dynamic
SEQUENCES = st.lists(st.tuples(st.integers(1, 150), st.integers(0, 200)), min_size=1, max_size=3)


def paged(
    rng: np.random.Generator, sequences: list[tuple[int, int]], kv: int, d: int, held: tuple[Any, bool]
) -> tuple[Batch, LayerCache]:
    """Sequences of (rows of this step, tokens before it) on pages in random order; unused places hold rubbish."""
    lengths = [rows + before for rows, before in sequences]
    needed = [-(-n // PAGE) for n in lengths]
    pages = iter(rng.permutation(sum(needed) + 1).astype(np.int32))
    tables = np.zeros((len(sequences), max(needed)), np.int32)
    for row, n in zip(tables, needed, strict=True):
        row[:n] = [next(pages) for _ in range(n)]
    places = [(s, p) for s, (rows, before) in enumerate(sequences) for p in range(before, before + rows)]
    positions = np.array([p for _, p in places], np.int32)
    slots = np.array([tables[s, p // PAGE] * PAGE + p % PAGE for s, p in places], np.int64)
    starts = np.cumsum([0, *[rows for rows, _ in sequences]]).astype(np.int32)
    batch = Batch(np.zeros(len(places), np.int32), positions, slots, starts, np.array(lengths, np.int32), tables)
    dtype, dynamic = held
    shape = (sum(needed) + 1, kv, PAGE, d)
    k, v = ((rng.standard_normal(shape) * (30 if dtype == np.int8 else 1)).astype(dtype) for _ in range(2))
    if np.dtype(dtype).itemsize > 1:
        return batch, LayerCache(k, v, np.ones(kv, np.float32), np.ones(kv, np.float32))
    k_scale, v_scale = (rng.uniform(0.01, 0.1, shape[:3] if dynamic else kv).astype(np.float32) for _ in range(2))
    return batch, LayerCache(k, v, k_scale, v_scale)


def bits(pages: np.ndarray) -> np.ndarray:
    return pages.view(np.uint8)


@given(SEQUENCES, st.sampled_from(CACHES), st.sampled_from([(9, 3, 64), (4, 4, 10), (6, 1, 80), (2, 2, 128)]),
       st.sampled_from([None, 1, 33, 64, 100]), st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention(
    ops: CpuOps, reference: ReferenceOps, sequences: Any, held: Any, heads: Any, window: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, kv, d = heads
    batch, cache = paged(rng, sequences, kv, d, held)
    q = rng.standard_normal((len(batch.ids), h * d)).astype(np.float32)
    got, want = ops.attention(q, batch, cache, window), reference.attention(q, batch, cache, window)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 * np.abs(want).max())


@given(
    SEQUENCES,
    st.sampled_from(CACHES),
    st.booleans(),
    st.sampled_from([(9, 3, 64), (4, 2, 10), (2, 1, 96)]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_rope_write(
    ops: CpuOps, reference: ReferenceOps, sequences: Any, held: Any, norm: bool, heads: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, kv, d = heads
    batch, cache = paged(rng, sequences, kv, d, held)
    other = LayerCache(cache.k.copy(), cache.v.copy(), cache.k_scale.copy(), cache.v_scale.copy())
    qkv = rng.standard_normal((len(batch.ids), (h + 2 * kv) * d)).astype(np.float32) * 3
    angle = rng.uniform(-3, 3, (int(batch.context.max()), d // 2)).astype(np.float32)
    rope = (np.cos(angle), np.sin(angle))
    norms = (rng.standard_normal(d).astype(np.float32), rng.standard_normal(d).astype(np.float32)) if norm else None
    got = ops.rope_write(qkv, batch, rope, norms, 1e-6, cache)
    want = reference.rope_write(qkv, batch, rope, norms, 1e-6, other)
    assert np.array_equal(got, want)
    for ours, theirs in zip(cache.arrays, other.arrays, strict=True):
        assert np.array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize(("dtype", "most"), [(np.int8, 127), (E4M3, 448)])
def test_dynamic_scales_of_dull_heads(ops: CpuOps, reference: ReferenceOps, dtype: Any, most: float) -> None:
    """Zeros, a scale that would be subnormal, one huge value, a constant: one head each, kept as K and as V."""
    heads = np.zeros((1, 4, 16), np.float32)
    heads[0, 1], heads[0, 2, 3], heads[0, 3] = 1e-38, -3e38, 0.25
    qkv = np.concatenate([heads[:, :1]] * 4 + [heads, heads], axis=1).reshape(1, -1)
    rope = (np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32))
    for table in (ops, reference):
        batch, cache = paged(np.random.default_rng(0), [(1, 0)], 4, 16, (dtype, True))
        table.rope_write(qkv, batch, rope, None, 1e-5, cache)
        page = batch.tables[0, 0]
        for pages, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            want = np.array([1, 1, np.float32(3e38) / np.float32(most), 0.25 / np.float32(most)], np.float32)
            assert np.array_equal(scales[page, :, 0], want)
            codes = pages[page, :, 0].astype(np.float32)
            assert np.abs(codes).max(axis=1).tolist() == [0, 0, most, most]
        assert np.isfinite(table.attention(np.ones((1, 64), np.float32), batch, cache)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_own_head_only(ops: CpuOps, bad: float) -> None:
    """Its scale is NaN, and so is what attends to it: whoever quantizes or scores that says where."""
    batch, cache = paged(np.random.default_rng(0), [(1, 70)], 2, 16, (np.int8, True))
    qkv = np.ones((1, 6 * 16), np.float32)
    qkv[0, 4 * 16] = bad  # the first value of V
    rope = (np.ones((71, 8), np.float32), np.zeros((71, 8), np.float32))
    q = ops.rope_write(qkv, batch, rope, None, 1e-5, cache)
    out = ops.attention(q, batch, cache).reshape(2, 16)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_caches_that_do_not_fit_are_refused(ops: CpuOps) -> None:
    batch, cache = paged(np.random.default_rng(0), [(1, 5)], 2, 16, (np.int8, True))
    q = np.ones((1, 32), np.float32)
    for bad in (cache.k_scale[:, :1].copy(), np.ones(2, np.float32), np.ones((2, 2), np.float32)):
        with pytest.raises(ValueError, match="cache scales must be"):
            ops.attention(q, batch, replace(cache, v_scale=bad))
    with pytest.raises(ValueError, match="a float cache has no dynamic scales"):
        ops.attention(q, batch, replace(cache, k=cache.k.astype(np.float32), v=cache.v.astype(np.float32)))


@pytest.mark.parametrize("held", [(np.float32, False), (np.int8, True)])
def test_rubbish_beyond_the_context_is_never_read(ops: CpuOps, held: Any) -> None:
    """A page is written token by token: what lies behind the last one may be NaN, and so may its scale."""
    rng = np.random.default_rng(0)
    for rows in (1, 3, 70):
        batch, cache = paged(rng, [(rows, 5)], 1, 16, held)
        for pages in cache.arrays[-2:]:
            pages[batch.tables[0, -1], :, (rows + 5) % PAGE :] = np.nan
        q = rng.standard_normal((rows, 32)).astype(np.float32)
        assert np.all(np.isfinite(ops.attention(q, batch, cache)))


def test_equal_scores_average_and_a_huge_score_selects(ops: CpuOps) -> None:
    batch, cache = paged(np.random.default_rng(0), [(1, 127)], 1, 16, STATIC[0])
    cache.k[:] = 0
    k, v = (pages[batch.tables[0]].transpose(0, 2, 1, 3).reshape(128, 16) for pages in (cache.k, cache.v))
    q = np.ones((1, 16), np.float32)
    np.testing.assert_allclose(ops.attention(q, batch, cache)[0], v.mean(axis=0), rtol=1e-4, atol=1e-6)
    cache.k[batch.tables[0, 1], 0, 3] = 1e4
    assert k.shape == v.shape
    np.testing.assert_allclose(ops.attention(q, batch, cache)[0], v[67], rtol=1e-6)


def test_indices_are_checked(ops: CpuOps) -> None:
    rng = np.random.default_rng(0)
    batch, cache = paged(rng, [(2, 0)], 1, 16, STATIC[0])
    qkv, q = rng.standard_normal((2, 48)).astype(np.float32), rng.standard_normal((2, 16)).astype(np.float32)
    rope = (np.ones((4, 8), np.float32), np.zeros((4, 8), np.float32))
    far = replace(batch, positions=np.array([0, 4], np.int32))
    with pytest.raises(ValueError, match="position is beyond the RoPE table"):
        ops.rope_write(qkv, far, rope, None, 1e-5, cache)
    with pytest.raises(ValueError, match="slot is beyond the cache"):
        ops.rope_write(qkv, replace(batch, slots=np.array([0, 9999], np.int64)), rope, None, 1e-5, cache)
    with pytest.raises(ValueError, match="page is beyond the cache"):
        ops.attention(q, replace(batch, tables=np.array([[77]], np.int32)), cache)
    with pytest.raises(ValueError, match="more tokens than its table has pages"):
        ops.attention(q, replace(batch, context=np.array([65], np.int32)), cache)
    with pytest.raises(ValueError, match="qkv must be"):
        ops.rope_write(qkv[:, :40].copy(), batch, rope, None, 1e-5, cache)
