"""One GPU's context, stream and memory. Every call that fails is an error of ours that names it.

Memory of a step comes from `Arena`: an array gives its room back when Python drops it, and because everything runs on
one stream in the order of the calls, the next taker cannot meet the last one's kernels. A captured graph keeps the
addresses it saw, so whatever must survive a replay is allocated for good.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import DependencyError, RequestError
from quantbench.infer.cuda.arena import Arena
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.compile import INSTALL


def load_driver() -> Any:
    """The driver's bindings, initialized. Raises DependencyError where package, driver or GPU is missing."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"--device cuda: NVIDIA's driver cannot be reached ({error}); it needs an NVIDIA GPU with driver 580 or "
            f"newer and {INSTALL}"
        ) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DependencyError(f"--device cuda: no usable NVIDIA GPU ({status.name}); run on the CPU with --device cpu")
    return driver


class Memory:
    """GPU `index` with a stream of its own."""

    def __init__(self, index: int) -> None:
        """Raises DependencyError as `load_driver`."""
        self.driver = load_driver()
        self._context: Any = None
        self._entered = threading.local()
        self._device = self._call(self.driver.cuDeviceGet, index)
        self._context = self._call(self.driver.cuDevicePrimaryCtxRetain, self._device)
        self.stream = self._call(self.driver.cuStreamCreate, self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.name = bytes(self._call(self.driver.cuDeviceGetName, 100, self._device)).split(b"\0")[0].decode().strip()
        self.capturing = False
        self._allocated: list[int] = []
        self._arena = Arena(self._slab)
        self.bad = self.upload(np.zeros(1, np.int32))  # bits that kernels set where a number is not finite

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A driver call's result. Raises DependencyError naming call and error."""
        self._enter()
        status, *results = function(*arguments)
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            asked = (
                f"{arguments[0] / 1e9:.2f} GB asked for" if function is self.driver.cuMemAlloc else function.__name__
            )
            raise RequestError(self._full(asked))
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise DependencyError(f"{function.__name__} failed on the GPU: {status.name}")
        return results[0] if len(results) == 1 else results or None

    def _enter(self) -> None:
        """Makes the context this thread's own: the driver keeps one per thread, and models are loaded on several."""
        if self._context is not None and not getattr(self._entered, "done", False):
            self._entered.done = True
            self._call(self.driver.cuCtxSetCurrent, self._context)

    def _full(self, what: str) -> str:
        free, total = self.memory
        return (
            f"the GPU is out of memory ({what}): {free / 1e9:.1f} of {total / 1e9:.1f} GB are free; "
            "give a smaller cache_tokens, max_batch or chunk, or a mode with smaller weights"
        )

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call(self.driver.cuDeviceGetAttribute, attribute, self._device))

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        self._enter()
        status, free, total = self.driver.cuMemGetInfo()
        return (int(free), int(total)) if status == self.driver.CUresult.CUDA_SUCCESS else (0, 0)

    @property
    def driver_version(self) -> str:
        """Of NVIDIA's kernel driver where it tells, else the CUDA version that it serves."""
        told = Path("/proc/driver/nvidia/version")
        words = told.read_text().split() if told.is_file() else []
        number = next((w for w in words if w[0].isdigit() and w.count(".") >= 1), None)
        cuda = int(self._call(self.driver.cuDriverGetVersion))
        return f"{number or 'unknown'} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialized room that is given back when the array is dropped."""
        kind = np.dtype(dtype)
        block = self._arena.take(max(1, math.prod(shape) * kind.itemsize))
        return DeviceArray(block.pointer, shape, kind, block)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialized room for good. Raises RequestError where the GPU has too little left."""
        kind = np.dtype(dtype)
        pointer = int(self._call(self.driver.cuMemAlloc, max(1, math.prod(shape) * kind.itemsize)))
        self._allocated.append(pointer)
        return DeviceArray(pointer, shape, kind)

    def release(self) -> None:
        """Gives all memory back: no array of this device may be used any more."""
        self.synchronize()
        for pointer in self._allocated:
            self._call(self.driver.cuMemFree, pointer)
        self._allocated.clear()

    def _slab(self, size: int) -> int:
        if self.capturing:
            raise DependencyError("a captured step asked for new memory; run it once before the capture")
        return self.allocate((size,), np.uint8).pointer

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        """A copy for good."""
        out = self.allocate(array.shape, array.dtype)
        self.write(out, array)
        self.synchronize()
        return out

    def write(self, out: DeviceArray, array: npt.NDArray[Any]) -> None:
        """Copies host to device, in stream order. Pageable memory is read before this returns."""
        source = np.ascontiguousarray(array)
        if source.nbytes:
            self._call(self.driver.cuMemcpyHtoDAsync, out.pointer, source.ctypes.data, source.nbytes, self.stream)

    def fetch(self, array: DeviceArray) -> npt.NDArray[Any]:
        """A copy on the host, after everything before it."""
        out = np.empty(array.shape, array.dtype)
        if out.nbytes:
            self._call(self.driver.cuMemcpyDtoHAsync, out.ctypes.data, array.pointer, out.nbytes, self.stream)
        self.synchronize()
        return out

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Host memory that copies to and from the device without a stop on the way; for good."""
        kind = np.dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        pointer = self._call(self.driver.cuMemHostAlloc, count, 0)
        raw = (ctypes.c_uint8 * count).from_address(int(pointer))
        array: npt.NDArray[Any] = np.frombuffer(raw, np.uint8).view(kind).reshape(shape)
        return array

    def fetch_later(self, out: npt.NDArray[Any], array: DeviceArray) -> Any:
        """Queues a copy into pinned memory; `wait` for the event that is returned before reading it."""
        self._call(self.driver.cuMemcpyDtoHAsync, out.ctypes.data, array.pointer, array.nbytes, self.stream)
        event = self._call(self.driver.cuEventCreate, self.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._call(self.driver.cuEventRecord, event, self.stream)
        return event

    def wait(self, event: Any) -> None:
        """Waits for an event of `fetch_later`, and ends it."""
        self._call(self.driver.cuEventSynchronize, event)
        self._call(self.driver.cuEventDestroy, event)

    def copy(self, out: DeviceArray, source: DeviceArray) -> None:
        """Device to device; `out` may be larger."""
        self._call(self.driver.cuMemcpyDtoDAsync, out.pointer, source.pointer, source.nbytes, self.stream)

    def fill(self, array: DeviceArray, byte: int) -> None:
        self._call(self.driver.cuMemsetD8Async, array.pointer, byte, array.nbytes, self.stream)

    def synchronize(self) -> None:
        self._call(self.driver.cuStreamSynchronize, self.stream)
