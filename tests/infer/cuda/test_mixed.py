"""Quantized weights and 16-bit inputs on Hopper: tiles, every cut of the kernel, widening, against the reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.cuda import digits, gemm, layout, mixed
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import INT4, INT8
from quantbench.infer.cuda.mixed import Cut
from quantbench.infer.cuda.report import Notes
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.pack import parts_of

from .conftest import poisoned
from .linears import REFERENCE, assert_close, inputs_of, weight_of

CUTS = [
    Cut(16, 64, 2, 128, 4, 4, 2), Cut(16, 128, 1, 128, 3, 2, 1), Cut(32, 64, 2, 128, 4, 1, 1),
    Cut(64, 128, 1, 128, 3, 1, 2), Cut(128, 128, 1, 128, 3, 2, 1), Cut(128, 64, 1, 128, 5, 1, 1),
    Cut(256, 128, 1, 128, 2, 1, 1), Cut(256, 128, 1, 128, 2, 2, 1),
]  # fmt: skip
FEW = [
    Cut(2, 64, 2, 128, 4, 4, 2),
    Cut(2, 128, 1, 128, 5, 1, 2),
    Cut(5, 64, 4, 128, 8, 1, 1),
    Cut(8, 128, 2, 128, 4, 2, 1),
]
CASES = ["w8", "w4", "w4-zero", "w4-32", "w4-64-zero", "w4-128"]


def hopper(device: Device) -> Device:
    if not device.hopper:
        pytest.skip("runs on a Hopper GPU, without QUANTBENCH_CUDA_PORTABLE")
    return device


@pytest.mark.parametrize("kind", [INT4, INT8])
def test_tiles_hold_codes_where_threads_look_for_them(kind: int) -> None:
    """kernels/mixed.cu in words: warp, g and t of a thread, halves of its 16 rows and inputs, steps of 16 inputs."""
    codes = np.random.default_rng(0).integers(-8, 8, (130, 300)).astype(np.int8)
    tiles, inputs = mixed.pack_tiles(kind, codes), mixed.tile_inputs(kind)
    assert tiles.shape == mixed.tiles_shape(kind, 130, 300)
    for row, column in ((0, 0), (8, 1), (63, 31), (64, 40), (129, 299), (77, 136)):
        thread = row % 64 // 16 * 32 + row % 8 * 4 + column % 8 // 2
        held = tiles[row // 64, column // inputs, thread * 16 : thread * 16 + 16]
        step, low, right, odd = column % inputs // 16, row % 16 // 8, column % 16 // 8, column % 2
        if kind == INT4:
            word = int(held.view(np.uint32)[step])
            assert (word >> (4 * (2 * right + low) + 16 * odd) & 15) - 8 == codes[row, column]
        else:
            assert held.view(np.int8)[step * 8 + low * 4 + right * 2 + odd] == codes[row, column]


def test_what_is_held_in_tiles() -> None:
    notes = Notes("sm_90a", "bfloat16")
    assert mixed.packs(notes, INT4, (4096, 4096), 128, zero=True)
    assert mixed.packs(notes, INT8, (40, 24), 24, zero=False)
    assert not mixed.packs(notes, INT8, (40, 24), 24, zero=True)  # nine bits: no exact 16-bit number
    assert not mixed.packs(notes, INT4, (41, 4096), 128, zero=False)
    assert not mixed.packs(notes, INT4, (40, 4096), 16, zero=False)
    assert not mixed.packs(Notes("sm_90a", "float32"), INT4, (4096, 4096), 128, zero=False)
    assert not mixed.packs(Notes("sm_89", "bfloat16"), INT4, (4096, 4096), 128, zero=False)


@pytest.mark.parametrize("tokens", [1, 4, 7, 9, 17, 33, 65, 129, 300])
@pytest.mark.parametrize(
    "shape", [(4096, 14336), (28672, 4096), (6144, 4096), (64, 128), (128, 256), (40, 24), (8192, 28672), (3072, 576)]
)
@pytest.mark.parametrize("kind", [INT4, INT8])
def test_every_cut_fits_a_multiprocessor(kind: int, shape: tuple[int, int], tokens: int) -> None:
    fields = layout.fields(kind, *shape, 128, False, tiled=True)
    made = {name: DeviceArray(0, *field) for name, field in fields.items()}
    w = DeviceWeight(kind, *shape, made["codes"], made["scale"], None, 128)
    for gated in (False, True):
        own = digits if tokens <= digits.MOST_TOKENS else mixed
        cut = own.cut_for(w, tokens, gated, 132)
        few = own is digits
        used = digits.shared_bytes(cut, w) if few else mixed.shared_bytes(cut, kind, mixed.group_of(w), False)
        assert cut.blocks * (used + 1024) <= mixed.SHARED + 2048
        assert cut.split <= mixed.slices_of(w, cut.depth)
        assert cut.stages >= 2
        assert cut.rows * cut.teams * 2 < 1024  # threads, less those that copy
        assert cut.stages % cut.teams == 0
        ring = cut.stages * (digits.stage_codes(cut, w) + (0 if few else cut.depth * cut.tokens * 2))
        assert ring >= (digits.results_bytes(cut) if few else cut.teams * cut.tokens * (cut.rows + 4) * 4)
        assert cut.rows % (128 if gated else 64) == 0


@pytest.mark.parametrize("case", ["w8", "w4-128"])
def test_huge_tiny_and_zero_tokens(device_bf16: Device, case: str) -> None:
    """Fixed point follows each token's largest input, whatever its size."""
    weight = weight_of(case, 64, 640, bias=False)
    a = inputs_of(hopper(device_bf16), weight, 5, 640)
    assert a.values is not None
    sizes = np.array([1e15, 1e-15, 0, 1, 1e-3], np.float32)[:, None]
    a = Activation((a.values * sizes).astype(ml_dtypes.bfloat16).astype(np.float32))
    assert_close(product(device_bf16, a, weight, None), a, weight, 3e-5)


@pytest.mark.parametrize("cut", [*FEW, *CUTS])
@pytest.mark.parametrize("case", CASES)
def test_every_cut(device_bf16: Device, case: str, cut: Cut) -> None:
    """Rows that fill no tile, a last group cut short, tokens that fill no block; twice the same bits."""
    hopper(device_bf16)
    tokens, n, k = min(cut.tokens, 200) - cut.tokens % 2, 200, 1664 if case == "w4-128" else 1600
    weight = weight_of(case, n, k)
    a = inputs_of(device_bf16, weight, tokens, k)
    got = product(device_bf16, a, weight, cut)
    rounded = cut.tokens == 256 and case not in ("w8", "w4", "w4-zero")
    assert_close(got, a, weight, 1e-2 if rounded else 3e-5)
    np.testing.assert_array_equal(product(device_bf16, a, weight, cut), got)


def product(device: Device, a: Activation, weight: Any, cut: Cut | None, dtype: Any = np.float32) -> np.ndarray:
    """By `mixed`, into the middle columns of a poisoned array."""
    packed = layout.pack(device, parts_of([weight])[0])
    assert mixed.tiled(packed)
    assert a.values is not None
    out = device.empty((a.tokens, packed.rows + 7), dtype)
    device.fill(out, 0xFF)
    few = a.tokens <= digits.MOST_TOKENS if cut is None else cut in FEW
    kernel = digits.linear if few else mixed.linear
    kernel(device, device.upload(a.values.astype(device.dtype)), packed, out, 3, cut=cut)
    got = device.fetch(out).astype(np.float32)
    assert np.all(np.isnan(got[:, :3]))
    assert np.all(np.isnan(got[:, packed.rows + 3 :]))
    return got[:, 3 : packed.rows + 3]


@pytest.mark.parametrize("tokens", [1, 8, 24, 48, 100, 256])
@pytest.mark.parametrize("case", ["w8", "w4-128"])
def test_the_cuts_that_are_chosen(device_bf16: Device, case: str, tokens: int) -> None:
    weight = weight_of(case, 4096, 1024, bias=False)
    a = inputs_of(hopper(device_bf16), weight, tokens, 1024)
    got = product(device_bf16, a, weight, None, ml_dtypes.bfloat16)
    assert_close(got, a, weight, 1e-2)


@pytest.mark.parametrize("tokens", [3, 40, 200])
@pytest.mark.parametrize("case", ["w8", "w4-64-zero"])
def test_float16_inputs(gpu: Device, case: str, tokens: int) -> None:
    device = hopper(poisoned(gpu, "float16"))
    weight = weight_of(case, 132, 640)
    a = inputs_of(device, weight, tokens, 640)
    assert_close(product(device, a, weight, None), a, weight, 2e-3 if tokens > 128 else 3e-5)


@pytest.mark.parametrize("case", CASES)
def test_widened(device_bf16: Device, case: str) -> None:
    """The weight itself, rounded once."""
    weight = weight_of(case, 132, 896, bias=False)
    packed = layout.pack(hopper(device_bf16), parts_of([weight])[0])
    got = device_bf16.fetch(mixed.widened(device_bf16, packed).codes)
    want = REFERENCE.linear(Activation(values=np.eye(896, dtype=np.float32)), REFERENCE.pack([weight])).T
    np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("tokens", [1, 20, 60, 130])
@pytest.mark.parametrize("case", ["w8", "w4-64-zero", "w4-128"])
@pytest.mark.parametrize("spec", [ActSpec(), ActSpec("int8", 0.5), ActSpec("fp8_e4m3", 0.01)], ids=str)
def test_swiglu_in_the_epilogue(device_bf16: Device, case: str, tokens: int, spec: ActSpec) -> None:
    weight = weight_of(case, 256, 640)
    packed = layout.pack(hopper(device_bf16), parts_of([weight])[0])
    assert gemm.fuses_swiglu(device_bf16, packed, tokens, spec)
    a = inputs_of(device_bf16, weight, tokens, 640)
    assert a.values is not None
    lent: Any = device_bf16.upload(a.values.astype(ml_dtypes.bfloat16))
    got = gemm.linear_swiglu(device_bf16, Activation(values=lent), packed, spec)
    want = REFERENCE.silu_mul(REFERENCE.linear(a, REFERENCE.pack([weight])), ActSpec()).values
    assert want is not None
    if spec.format is None:
        values = device_bf16.fetch(got.values).astype(np.float32)  # type: ignore[arg-type]
        np.testing.assert_allclose(values, want, rtol=2e-2, atol=2e-2 * float(np.abs(want).max(initial=1)))
        return
    if tokens > 128:  # weights were rounded: what little remains of a large sum errs by more than a code
        assert got.codes is not None
        return
    codes = device_bf16.fetch(got.codes).astype(np.float32) * spec.scale  # type: ignore[arg-type,operator]
    top = 127 if spec.format == "int8" else 448
    clipped = np.clip(want, -top * spec.scale, top * spec.scale)  # type: ignore[operator]
    np.testing.assert_allclose(codes, clipped, rtol=7e-2, atol=1.01 * spec.scale + 1e-3)  # type: ignore[operator]
