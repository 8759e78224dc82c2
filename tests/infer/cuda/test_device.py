from __future__ import annotations

import ctypes

import numpy as np
import pytest

from quantbench.errors import DependencyError, RequestError
from quantbench.infer.cuda.device import Device, _argument, architecture
from quantbench.infer.ops import load_ops


def test_an_architecture_of_its_own_unless_the_portable_path_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTBENCH_CUDA_PORTABLE", raising=False)
    assert [architecture(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["sm_80", "sm_89", "sm_90a", "sm_120"]
    monkeypatch.setenv("QUANTBENCH_CUDA_PORTABLE", "1")
    assert architecture((9, 0)) == "sm_90"


def test_a_gpu_too_old_is_refused() -> None:
    with pytest.raises(DependencyError, match="this GPU is sm_75; kernels need sm_80"):
        architecture((7, 5))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DependencyError, match=r"unknown activation dtype 'bfloat'\. Did you mean bfloat16"):
        Device("bfloat")


@pytest.mark.parametrize(
    ("value", "size"), [(1, 4), (1.5, 4), (np.float64(1.5), 8), (np.int64(3), 8), (np.float32(2), 4), (None, 8)]
)
def test_arguments_have_the_size_that_kernels_expect(value: object, size: int) -> None:
    held = _argument(value)
    assert (held.nbytes if isinstance(held, np.ndarray) else ctypes.sizeof(held)) == size


def test_without_a_gpu_the_error_is_one_line() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(DependencyError, match=r"--device cuda: NVIDIA's driver cannot be reached") as caught:
            load_ops("cuda")
        assert "\n" not in str(caught.value)
    else:
        pytest.skip("runs where NVIDIA's driver is missing, as in CI")


def test_memory_goes_there_and_back(device: Device) -> None:
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    there = device.upload(array)
    np.testing.assert_array_equal(device.fetch(there), array)
    np.testing.assert_array_equal(device.fetch(there.rows(3, 5)), array[3:5])
    copy = device.empty((10, 100), np.float32)
    device.copy(copy, there)
    np.testing.assert_array_equal(device.fetch(copy), array)
    later = device.pinned((10, 100), np.float32)
    device.wait(device.fetch_later(later, copy))
    np.testing.assert_array_equal(later, array)


def test_more_memory_than_there_is_is_one_clear_error(device: Device) -> None:
    with pytest.raises(RequestError, match=r"the GPU is out of memory .* GB are free; give a smaller"):
        device.allocate((1 << 50,), np.uint8)


def test_a_captured_step_runs_again_on_new_data(device: Device) -> None:
    """kernels/step.cu: what the host wrote stays with flag 0; with flag 1 the last tokens become the input."""
    sizes = {"flag": 1, "tokens": 2, "ids": 2, "positions": 2, "context": 2}
    arrays = {name: device.upload(np.zeros(n, np.int32)) for name, n in sizes.items()}
    slots = device.upload(np.zeros(2, np.int64))
    tables = device.upload(np.array([[7, 9], [3, 4]], np.int32))
    kernel = device.kernel("step.cu", "advance")

    def step() -> None:
        device.launch(kernel, 1, 128, *arrays.values(), slots, tables, 2, 2)

    step()
    with device.capture([]) as found:
        step()
    device.write(arrays["tokens"], np.array([11, 12], np.int32))
    device.write(arrays["positions"], np.array([62, 63], np.int32))
    device.write(arrays["context"], np.array([63, 0], np.int32))
    device.replay(found[0])
    assert device.fetch(arrays["ids"]).tolist() == [0, 0]
    device.write(arrays["flag"], np.ones(1, np.int32))
    device.replay(found[0])
    device.replay(found[0])
    assert device.fetch(arrays["ids"]).tolist() == [11, 0]
    assert device.fetch(arrays["positions"]).tolist() == [64, 63]
    assert device.fetch(arrays["context"]).tolist() == [65, 0]
    assert device.fetch(slots).tolist() == [9 * 64, 0]
