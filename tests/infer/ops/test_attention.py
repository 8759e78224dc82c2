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

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int8, ml_dtypes.float8_e4m3fn)
SEQUENCES = st.lists(st.tuples(st.integers(1, 150), st.integers(0, 200)), min_size=1, max_size=3)


def paged(
    rng: np.random.Generator, sequences: list[tuple[int, int]], kv: int, d: int, dtype: Any
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
    quantized = dtype in DTYPES[3:]
    shape = (sum(needed) + 1, kv, PAGE, d)
    k, v = ((rng.standard_normal(shape) * (30 if dtype == np.int8 else 1)).astype(dtype) for _ in range(2))
    scales = [rng.uniform(0.01, 0.1, kv).astype(np.float32) if quantized else np.ones(kv, np.float32) for _ in range(2)]
    return batch, LayerCache(k, v, *scales)


def bits(pages: np.ndarray) -> np.ndarray:
    return pages.view(np.uint8)


@given(SEQUENCES, st.sampled_from(DTYPES), st.sampled_from([(9, 3, 64), (4, 4, 10), (6, 1, 80), (2, 2, 128)]),
       st.sampled_from([None, 1, 33, 64, 100]), st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention(
    ops: CpuOps, reference: ReferenceOps, sequences: Any, dtype: Any, heads: Any, window: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, kv, d = heads
    batch, cache = paged(rng, sequences, kv, d, dtype)
    q = rng.standard_normal((len(batch.ids), h * d)).astype(np.float32)
    got, want = ops.attention(q, batch, cache, window), reference.attention(q, batch, cache, window)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 * np.abs(want).max())


@given(
    SEQUENCES,
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([(9, 3, 64), (4, 2, 10), (2, 1, 96)]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_rope_write(
    ops: CpuOps, reference: ReferenceOps, sequences: Any, dtype: Any, norm: bool, heads: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, kv, d = heads
    batch, cache = paged(rng, sequences, kv, d, dtype)
    other = replace(cache, k=cache.k.copy(), v=cache.v.copy())
    qkv = rng.standard_normal((len(batch.ids), (h + 2 * kv) * d)).astype(np.float32) * 3
    angle = rng.uniform(-3, 3, (int(batch.context.max()), d // 2)).astype(np.float32)
    rope = (np.cos(angle), np.sin(angle))
    norms = (rng.standard_normal(d).astype(np.float32), rng.standard_normal(d).astype(np.float32)) if norm else None
    got = ops.rope_write(qkv, batch, rope, norms, 1e-6, cache)
    want = reference.rope_write(qkv, batch, rope, norms, 1e-6, other)
    assert np.array_equal(got, want)
    assert np.array_equal(bits(cache.k), bits(other.k))
    assert np.array_equal(bits(cache.v), bits(other.v))


def test_rubbish_beyond_the_context_is_never_read(ops: CpuOps) -> None:
    """A page is written token by token: what lies behind the last one may be NaN."""
    rng = np.random.default_rng(0)
    for rows in (1, 3, 70):
        batch, cache = paged(rng, [(rows, 5)], 1, 16, np.float32)
        for pages in (cache.k, cache.v):
            pages[batch.tables[0, -1], :, (rows + 5) % PAGE :] = np.nan
        q = rng.standard_normal((rows, 32)).astype(np.float32)
        assert np.all(np.isfinite(ops.attention(q, batch, cache)))


def test_equal_scores_average_and_a_huge_score_selects(ops: CpuOps) -> None:
    batch, cache = paged(np.random.default_rng(0), [(1, 127)], 1, 16, np.float32)
    cache.k[:] = 0
    k, v = (pages[batch.tables[0]].transpose(0, 2, 1, 3).reshape(128, 16) for pages in (cache.k, cache.v))
    q = np.ones((1, 16), np.float32)
    np.testing.assert_allclose(ops.attention(q, batch, cache)[0], v.mean(axis=0), rtol=1e-4, atol=1e-6)
    cache.k[batch.tables[0, 1], 0, 3] = 1e4
    assert k.shape == v.shape
    np.testing.assert_allclose(ops.attention(q, batch, cache)[0], v[67], rtol=1e-6)


def test_indices_are_checked(ops: CpuOps) -> None:
    rng = np.random.default_rng(0)
    batch, cache = paged(rng, [(2, 0)], 1, 16, np.float32)
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
