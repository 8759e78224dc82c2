from __future__ import annotations

import ctypes
import importlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from quantbench.errors import DependencyError
from quantbench.infer.cuda import blas
from quantbench.infer.cuda.blas import Blas, load_library, open_blas, suits
from quantbench.infer.cuda.device import Device
from quantbench.quantizers.formats import E4M3


@pytest.fixture
def library(device_bf16: Device) -> Blas:
    found = open_blas(device_bf16)
    if found is None:
        pytest.skip("runs with nvidia-cublas installed, and no QUANTBENCH_CUDA_BLAS or _PORTABLE set")
    return found


def test_where_it_is_missing_the_line_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pathfinder = importlib.import_module("cuda.pathfinder")

    def nothing(name: str) -> None:
        raise RuntimeError(f"{name} not found")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", nothing)
    with pytest.raises(DependencyError, match=r"our own kernels run instead.*pip install nvidia-cublas"):
        load_library()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_bf16_products(device_bf16: Device, library: Blas, dtype: type) -> None:
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((70, 128), (96, 128)))
    out = device_bf16.empty((70, 96), dtype)
    library.matmul(device_bf16.upload(x), device_bf16.upload(w), out)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(device_bf16.fetch(out).astype(np.float64), want, rtol=8e-3, atol=2e-2)


def test_e4m3_products_with_a_scale_per_token_and_channel(device_bf16: Device, library: Blas) -> None:
    if device_bf16.capability != (9, 0):
        pytest.skip("runs on a Hopper GPU: cuBLASLt has a scale per token and channel on sm_90 only")
    random = np.random.default_rng(1)
    x, w = (random.standard_normal(shape).astype(E4M3) for shape in ((80, 256), (64, 256)))
    tokens, channels = (random.uniform(0.5, 2, n).astype(np.float32) for n in (80, 64))
    out = device_bf16.empty((80, 64), np.float32)
    scales = (device_bf16.upload(channels), device_bf16.upload(tokens))
    library.matmul(device_bf16.upload(x), device_bf16.upload(w), out, scales)
    want = x.astype(np.float64) @ w.astype(np.float64).T * tokens[:, None] * channels
    np.testing.assert_allclose(device_bf16.fetch(out), want, rtol=5e-3, atol=0.2)


def test_rows_that_are_not_aligned_are_not_its_matter(device_bf16: Device) -> None:
    def array(rows: int, columns: int) -> object:
        return device_bf16.empty((rows, columns), ml_dtypes.bfloat16)

    assert suits(array(64, 64), array(64, 64), array(64, 64))
    assert not suits(array(64, 60), array(64, 60), array(64, 64))
    assert not suits(array(64, 64), array(63, 64), array(64, 63))


def test_it_can_be_forbidden(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_CUDA_BLAS", "0")
    blas._OPEN.pop(gpu, None)
    assert open_blas(gpu) is None
    blas._OPEN.pop(gpu, None)


def test_a_call_that_fails_is_named() -> None:
    library = Blas.__new__(Blas)
    library._library = SimpleNamespace(cublasLtMatmul=lambda: 15)
    with pytest.raises(DependencyError, match="cublasLtMatmul failed with cuBLAS status 15"):
        library._call("cublasLtMatmul")


def test_a_shape_without_an_algorithm_is_named(library: Blas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_call", lambda *arguments: None)
    with pytest.raises(DependencyError, match=r"no algorithm for tokens, rows, depth = \(1, 2, 3\)"):
        library._pick(ctypes.c_void_p(), (ctypes.c_void_p(),) * 3, (1, 2, 3))
