from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from quantbench.errors import DependencyError
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.memory import load_driver


def test_a_driver_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(DependencyError, match=r"no usable NVIDIA GPU \(CUDA_ERROR_NO_DEVICE\); run on the CPU"):
        load_driver()


def test_a_captured_step_gets_no_new_memory(device: Device) -> None:
    with pytest.raises(DependencyError, match="a captured step asked for new memory"), device.capture([]):
        device.empty((8 << 30,), "uint8")


def test_any_thread_may_use_a_device(device: Device) -> None:
    array = np.arange(1000, dtype=np.float32)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(device.upload, array).result()
        pool.submit(device.fill, there.rows(0, 10), 0).result()
    np.testing.assert_array_equal(device.fetch(there), np.where(np.arange(1000) < 10, 0, array))


def test_a_failed_call_is_named(device: Device) -> None:
    with pytest.raises(DependencyError, match="cuMemFree failed on the GPU: CUDA_ERROR_INVALID_VALUE"):
        device._call(device.driver.cuMemFree, 12345)


def test_a_launch_that_cannot_be_is_named_with_its_sizes(device: Device) -> None:
    kernel = device.kernel("bench.cu", "pause", KIND=4)
    with pytest.raises(DependencyError, match=r"kernel pause cannot be launched \(.*\): grid 1, block 4096, shared 0"):
        device.launch(kernel, 1, 4096, 0)
