"""Operations on rows on the GPU against the numpy reference: random, odd, zero and outlier rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.cuda import rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops import ActSpec, Batch, LayerCache
from quantbench.infer.ops.reference import ReferenceOps

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
REFERENCE = ReferenceOps()
WIDTHS = [1, 7, 36, 576, 577, 4096, 14336]
SPECS = [
    ActSpec(), ActSpec("int8"), ActSpec("fp8_e4m3"), ActSpec("int8", 0.03), ActSpec("fp8_e4m3", 0.01),
    ActSpec("int8", None, True),
]  # fmt: skip


def matrix(width: int, tokens: int = 5, seed: int = 0) -> np.ndarray:
    """Rows of normal numbers; one of zeros, one with an outlier, one huge and one tiny."""
    x = np.random.default_rng(seed + width).standard_normal((tokens, width)).astype(np.float32)
    x[1 % tokens] = 0
    x[2 % tokens, width // 2] = 3000
    x[3 % tokens] *= np.float32(1e6)
    x[4 % tokens] *= np.float32(1e-7)
    return x


def rounded(device: Device, x: np.ndarray) -> np.ndarray:
    """x as the device holds it between operations, in float32."""
    return x.astype(device.dtype).astype(np.float32)


def values_of(device: Device, array: Any) -> np.ndarray:
    return device.fetch(array).astype(np.float32)


def assert_same_codes(got: np.ndarray, want: np.ndarray, allowed: float) -> None:
    """At most the share `allowed` of codes differ, by one step of int8 or one of e4m3's."""
    assert got.dtype == want.dtype
    a, b = (c.view(np.uint8).astype(int) if c.dtype == E4M3 else c.astype(int) for c in (got, want))
    different = a != b
    assert np.abs(a - b)[different & ((a & 0x7F) != 0) & ((b & 0x7F) != 0)].max(initial=0) <= 1
    assert different.mean() <= allowed, (
        f"{different.sum()} of {different.size} codes differ, rows {np.unique(np.nonzero(different)[0])}"
    )


def assert_activation(device: Device, got: Any, want: Any, allowed: float, close: float) -> None:
    assert got.format == want.format
    assert (got.values is None, got.codes is None) == (want.values is None, want.codes is None)
    if want.values is not None:
        size = np.abs(want.values).max(axis=1, keepdims=True)
        assert np.all(
            np.abs(values_of(device, got.values) - want.values) <= close * (np.abs(want.values) + 1e-3 * size)
        )
    if want.codes is not None:
        np.testing.assert_allclose(device.fetch(got.scale), want.scale, rtol=close, atol=0)
        assert_same_codes(device.fetch(got.codes), want.codes, allowed)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm_adds_in_place_normalizes_and_quantizes(device: Device, width: int, spec: ActSpec) -> None:
    x, delta = matrix(width), matrix(width, seed=1)
    weight = np.random.default_rng(2).uniform(0.5, 2, width).astype(np.float32)
    stream = device.upload(x)
    got = rows.add_norm(device, stream, device.upload(delta), device.upload(weight), 1e-5, spec)
    want = REFERENCE.add_norm(x, delta, weight, 1e-5, spec)
    np.testing.assert_array_equal(device.fetch(stream), x)
    assert_activation(device, got, want, allowed=1e-4, close=3e-7)
    assert device.fetch(device.bad)[0] == 0


@pytest.mark.parametrize("width", [577, 4096])
@pytest.mark.parametrize("spec", SPECS[:3])
def test_bf16_between_operations(device_bf16: Device, width: int, spec: ActSpec) -> None:
    device = device_bf16
    x, delta, weight = matrix(width), rounded(device, matrix(width, seed=1)), np.ones(width, np.float32)
    got = rows.add_norm(device, device.upload(x), device.upload(delta.astype(BF16)), device.upload(weight), 1e-6, spec)
    assert_activation(device, got, REFERENCE.add_norm(x, delta, weight, 1e-6, spec), 1e-3, 2**-8)
    got = rows.quantize(device, device.upload(delta.astype(BF16)), spec)
    if spec.format is not None:
        assert_activation(device, got, REFERENCE.quantize(delta, spec), 0, 0)
    gate_up = rounded(device, matrix(2 * width, seed=3))
    got = rows.silu_mul(device, device.upload(gate_up.astype(BF16)), spec)
    assert_activation(device, got, REFERENCE.silu_mul(gate_up, spec), 1e-3, 2**-8)


def test_norm_without_a_delta_leaves_the_stream(device: Device) -> None:
    x, weight = matrix(64), np.ones(64, np.float32)
    stream = device.upload(x)
    got = rows.add_norm(device, stream, None, device.upload(weight), 1e-5)
    np.testing.assert_array_equal(device.fetch(stream), x)
    assert_activation(device, got, REFERENCE.add_norm(x.copy(), None, weight, 1e-5), 0, 3e-7)


@pytest.mark.parametrize("spec", SPECS[1:5])
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_equals_the_reference_bit_for_bit(device: Device, width: int, spec: ActSpec) -> None:
    x = matrix(width)
    assert_activation(device, rows.quantize(device, device.upload(x), spec), REFERENCE.quantize(x, spec), 0, 0)


def test_every_half_way_case_rounds_as_the_reference(device: Device) -> None:
    halves = (np.arange(-300, 300, dtype=np.float32) / 2).reshape(1, -1)
    steps = np.concatenate([np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)] * 2)
    steps = steps[np.isfinite(steps)]
    between = ((steps[1:] + steps[:-1]) / 2).reshape(1, -1).astype(np.float32)
    for x, spec in ((halves, ActSpec("int8", 1.0)), (between, ActSpec("fp8_e4m3", 1.0))):
        assert_activation(device, rows.quantize(device, device.upload(x), spec), REFERENCE.quantize(x, spec), 0, 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_a_number_that_is_none_is_reported(device: Device, poison: float, scale: float | None) -> None:
    x = matrix(100)
    x[3, 99] = poison
    rows.quantize(device, device.upload(x), ActSpec("int8", scale))
    assert device.fetch(device.bad)[0] & 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(device: Device, width: int, spec: ActSpec) -> None:
    gate_up = matrix(2 * width)
    got = rows.silu_mul(device, device.upload(gate_up), spec)
    assert_activation(device, got, REFERENCE.silu_mul(gate_up, spec), allowed=1e-3, close=5e-7)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_embed_and_gather(device: Device, dtype: Any) -> None:
    table = np.random.default_rng(0).standard_normal((50, 37)).astype(dtype)
    ids = np.array([49, 0, 7, 7], np.int32)
    kind = {4: 0, 2: 1}[np.dtype(dtype).itemsize] + (dtype == np.float16)
    weight = DeviceWeight(kind, 50, 37, device.upload(table))
    got = rows.embed(device, weight, device.upload(ids))
    np.testing.assert_array_equal(device.fetch(got), table[ids].astype(np.float32))
    np.testing.assert_array_equal(device.fetch(rows.gather(device, weight.codes, device.upload(ids))), table[ids])


def test_a_float_is_two_bf16(device: Device) -> None:
    x = matrix(33)
    halves = device.fetch(rows.split_bf16(device, device.upload(x))).astype(np.float64)
    np.testing.assert_allclose(halves[:, :33] + halves[:, 33:], x, rtol=2**-16, atol=1e-30)


def batch_of(positions: np.ndarray, slots: np.ndarray) -> Batch:
    one = np.zeros(1, np.int32)
    return Batch(positions, positions, slots, one, one, one.reshape(1, 1))


def on_device(device: Device, batch: Batch) -> DeviceBatch:
    arrays = [
        device.upload(a) for a in (batch.ids, batch.positions, batch.slots, batch.starts, batch.context, batch.tables)
    ]
    return DeviceBatch(*arrays, decode=False, max_context=int(batch.context.max()), max_rows=len(batch.ids))


def pages_like(cache: LayerCache, device: Device) -> DeviceCache:
    return DeviceCache(*(device.upload(a) for a in (cache.k, cache.v, cache.k_scale, cache.v_scale)))


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, np.int8, E4M3])
def test_rope_write(device: Device, size: int, dtype: Any) -> None:
    rng = np.random.default_rng(size)
    heads, kv_heads, tokens = 6, 2, 5
    norms = None if size == 64 else tuple(rng.uniform(0.5, 2, size).astype(np.float32) for _ in range(2))
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * size)).astype(np.float32)
    qkv[3] = 0
    angle = rng.uniform(0, 6, (300, size // 2)).astype(np.float32)
    rope = np.cos(angle), np.sin(angle)
    scales = rng.uniform(0.01, 0.03, (2, kv_heads)).astype(np.float32)
    if np.dtype(dtype).itemsize > 1:
        scales[:] = 1
    raw = rng.integers(0, 100, (3, kv_heads, 64, size * np.dtype(dtype).itemsize)).astype(np.uint8)
    want = LayerCache(raw.copy().view(dtype), raw.copy().view(dtype), scales[0], scales[1])
    batch = batch_of(np.array([0, 299, 5, 6, 7], np.int32), np.array([64 + 3, 0, 191, 100, 63], np.int64))
    pages = pages_like(want, device)
    tables: Any = tuple(device.upload(r) for r in rope)
    weights: Any = norms and tuple(device.upload(n) for n in norms)
    got = rows.rope_write(device, device.upload(qkv), on_device(device, batch), tables, weights, 1e-6, pages)
    q = REFERENCE.rope_write(qkv, batch, rope, norms, 1e-6, want)
    np.testing.assert_allclose(device.fetch(got), q, rtol=0, atol=0 if norms is None else 1e-6)
    for here, there in ((pages.k, want.k), (pages.v, want.v)):
        here_values, there_values = device.fetch(here).astype(np.float32), there.astype(np.float32)
        if norms is None or here is pages.v:
            np.testing.assert_array_equal(here_values, there_values)
        else:
            assert (here_values != there_values).mean() < 1e-3
            np.testing.assert_allclose(here_values, there_values, rtol=0.13, atol=1.01)


def test_a_padded_row_writes_nothing(device: Device) -> None:
    qkv = np.ones((2, 4 * 16), np.float32)
    cache = LayerCache(*(np.zeros((1, 1, 64, 16), np.int8) for _ in range(2)), *(np.ones(1, np.float32),) * 2)
    pages = pages_like(cache, device)
    table = device.upload(np.ones((4, 8), np.float32))
    batch = batch_of(np.zeros(2, np.int32), np.array([-1, -1], np.int64))
    rows.rope_write(device, device.upload(qkv), on_device(device, batch), (table, table), None, 1e-6, pages)
    assert not device.fetch(pages.k).any()
    assert not device.fetch(pages.v).any()


def test_one_cache_scale_per_token_and_head(device: Device) -> None:
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((3, 4 * 64)).astype(np.float32)
    qkv[1] = 0
    empty = np.zeros((2, 1, 64, 64), np.int8)
    scales = np.zeros((2, 1, 64), np.float32)
    pages = pages_like(LayerCache(empty, empty, scales, scales), device)
    flat = device.upload(np.ones((4, 32), np.float32)), device.upload(np.zeros((4, 32), np.float32))
    batch = batch_of(np.zeros(3, np.int32), np.array([5, 64, 127], np.int64))
    rows.rope_write(device, device.upload(qkv), on_device(device, batch), flat, None, 1e-6, pages)
    for array, scale, first in ((pages.k, pages.k_scale, 128), (pages.v, pages.v_scale, 192)):
        want = REFERENCE.quantize(qkv[:, first : first + 64], ActSpec("int8"))
        assert want.codes is not None
        assert want.scale is not None
        codes, written = device.fetch(array).reshape(128, 64), device.fetch(scale).reshape(128)
        np.testing.assert_array_equal(codes[[5, 64, 127]], want.codes)
        np.testing.assert_array_equal(written[[5, 64, 127]], want.scale)
        assert np.count_nonzero(written) == 3


def test_rows_of_an_array_are_not_copied(device: Device) -> None:
    array: DeviceArray = device.upload(matrix(64))
    got = rows.quantize(device, array.rows(2, 4), ActSpec("int8"))
    want = REFERENCE.quantize(matrix(64)[2:4], ActSpec("int8"))
    assert_activation(device, got, want, 0, 0)


def test_a_row_is_shared_evenly() -> None:
    for heads in range(1, 130):
        for size in (16, 64, 80, 96, 128, 256):
            parts = rows.parts_of_row(heads * size)
            assert heads * size % (4 * parts) == 0
            assert heads * size // parts <= 1024
    assert rows.parts_of_row(32 * 128) == 8
