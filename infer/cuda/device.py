"""The device: one context, one stream, memory, compiled kernels, launches and graphs.

Everything runs on one stream in the order of the calls. Memory of a step comes from `Arena`: an array gives its room
back when Python drops it, and because the stream keeps order the next taker cannot meet the last one's kernels. A
captured graph keeps the addresses it saw, so whatever must survive a replay is allocated for good.

Launches are programmatic (PDL) on sm_90 and newer: a kernel may start while its predecessor ends, reads weights, and
waits for the predecessor with griddepcontrol.wait before it touches anything else. Every kernel here does.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantbench.errors import DependencyError, RequestError, unknown
from quantbench.infer.cuda.arena import Arena
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.compile import INSTALL, cubin, load_nvrtc

Dims = int | tuple[int, ...]
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BIG_SHARED = 48 << 10  # bytes of shared memory that a kernel gets unasked


@dataclass
class Kernel:
    """A loaded kernel. `shared`: the dynamic shared memory that it was allowed so far."""

    name: str
    handle: Any
    shared: int = BIG_SHARED


@dataclass(frozen=True)
class TensorMap:
    """A tensor map (TMA descriptor), passed to kernels by value; `keep` holds the array it describes."""

    map: Any
    keep: DeviceArray


@dataclass(frozen=True)
class Graph:
    """A captured step, ready to launch again."""

    handle: Any
    keep: list[Any] = field(default_factory=list)  # arrays whose addresses it holds


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


class Device:
    """One GPU. `dtype` is what arrays between operations hold: float32 (as the CPU runtime) or bfloat16."""

    def __init__(self, dtype: str = "float32", index: int = 0) -> None:
        """Raises DependencyError without a usable GPU, compiler or architecture, and for an unknown dtype."""
        if dtype not in DTYPES:
            raise DependencyError(unknown("activation dtype", dtype, DTYPES))
        self.dtype = DTYPES[dtype]
        self.driver = load_driver()
        load_nvrtc()
        self._device = self._call(self.driver.cuDeviceGet, index)
        context = self._call(self.driver.cuDevicePrimaryCtxRetain, self._device)
        self._call(self.driver.cuCtxSetCurrent, context)
        self.stream = self._call(self.driver.cuStreamCreate, self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        self.arch = architecture(self.capability)
        self.hopper = self.arch == "sm_90a"
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.name = bytes(self._call(self.driver.cuDeviceGetName, 100, self._device)).rstrip(b"\0").decode()
        self.capturing = False
        self.pdl = self.capability >= (9, 0) and os.environ.get("QUANTBENCH_CUDA_PDL", "1") != "0"
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._configs: dict[tuple[Any, ...], Any] = {}
        self._arena = Arena(self._slab)
        self.bad = self.upload(np.zeros(1, np.int32))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A driver call's result. Raises DependencyError naming call and error."""
        status, *results = function(*arguments)
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise RequestError(self._full(function.__name__))
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise DependencyError(f"{function.__name__} failed on the GPU: {status.name}")
        return results[0] if len(results) == 1 else results or None

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
        status, free, total = self.driver.cuMemGetInfo()
        return (int(free), int(total)) if status == self.driver.CUresult.CUDA_SUCCESS else (0, 0)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialized room that is given back when the array is dropped."""
        kind = np.dtype(dtype)
        block = self._arena.take(max(1, math.prod(shape) * kind.itemsize))
        return DeviceArray(block.pointer, shape, kind, block)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialized room for good. Raises RequestError where the GPU has too little left."""
        kind = np.dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        status, pointer = self.driver.cuMemAlloc(max(1, count))
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise RequestError(self._full(f"{count / 1e9:.2f} GB asked for"))
        return DeviceArray(int(pointer), shape, kind)

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
        return np.frombuffer(raw, np.uint8).view(kind).reshape(shape)

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

    def kernel(self, file: str, entry: str, **macros: int | str) -> Kernel:
        """`entry` of kernels/`file`, compiled for this device. Raises DependencyError where it does not compile."""
        key = (file, entry, *sorted(macros.items()))
        if key not in self._kernels:
            module = self._module(file, tuple(sorted(macros.items())))
            handle = self._call(self.driver.cuModuleGetFunction, module, entry.encode())
            self._kernels[key] = Kernel(entry, handle)
        return self._kernels[key]

    def _module(self, file: str, macros: tuple[tuple[str, int | str], ...]) -> Any:
        key = ("module", file, *macros)
        if key not in self._configs:
            self._configs[key] = self._call(self.driver.cuModuleLoadData, cubin(file, self.arch, dict(macros)))
        return self._configs[key]

    def launch(
        self, kernel: Kernel, grid: Dims, block: Dims, *arguments: Any, shared: int = 0, pdl: bool = True
    ) -> None:
        """Queues a kernel. Arrays go as pointers, None as null, int as 32 bits, float as float32, numpy scalars as they
        are, tensor maps by value."""
        if shared > kernel.shared:
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call(self.driver.cuFuncSetAttribute, kernel.handle, attribute, shared)
            kernel.shared = shared
        values = [_argument(a) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(_address(v) for v in values))
        config = self._config(grid, block, shared, pdl and self.pdl)
        (status,) = self.driver.cuLaunchKernelEx(config, kernel.handle, ctypes.addressof(addresses), 0)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise DependencyError(
                f"kernel {kernel.name} cannot be launched ({status.name}): grid {grid}, block {block}, shared {shared}"
            )

    def _config(self, grid: Dims, block: Dims, shared: int, pdl: bool) -> Any:
        key = (grid, block, shared, pdl)
        if key not in self._configs:
            config = self.driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = _three(grid)
            config.blockDimX, config.blockDimY, config.blockDimZ = _three(block)
            config.sharedMemBytes, config.hStream = shared, self.stream
            config.numAttrs = 0
            if pdl:
                attribute = self.driver.CUlaunchAttribute()
                kind = self.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                attribute.id = kind
                attribute.value.programmaticStreamSerializationAllowed = 1
                config.attrs, config.numAttrs = [attribute], 1
            self._configs[key] = config
        return self._configs[key]

    def tensor_map(self, array: DeviceArray, box: tuple[int, int], swizzle: int = 128) -> TensorMap:
        """A descriptor that loads boxes of [box[0] rows, box[1] elements] of a matrix. `swizzle`: bytes, 0 for none."""
        d = self.driver
        names = {1: "UINT8", 2: "BFLOAT16", 4: "FLOAT32"}
        kind = getattr(d.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{names[array.dtype.itemsize]}")
        rows, columns = array.shape
        result = self._call(
            d.cuTensorMapEncodeTiled, kind, 2, array.pointer,
            [d.cuuint64_t(columns), d.cuuint64_t(rows)], [d.cuuint64_t(columns * array.dtype.itemsize)],
            [d.cuuint32_t(box[1]), d.cuuint32_t(box[0])], [d.cuuint32_t(1), d.cuuint32_t(1)],
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(d.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        return TensorMap(result, array)

    @contextmanager
    def capture(self, keep: list[Any]) -> Iterator[list[Graph]]:
        """Records what is launched inside instead of running it; the list that it gives then holds the graph."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call(self.driver.cuStreamBeginCapture, self.stream, mode)
        found: list[Graph] = []
        self.capturing = True
        try:
            yield found
        finally:
            self.capturing = False
            recorded = self._call(self.driver.cuStreamEndCapture, self.stream)
        executable = self._call(self.driver.cuGraphInstantiate, recorded, 0)
        self._call(self.driver.cuGraphDestroy, recorded)
        self._call(self.driver.cuGraphUpload, executable, self.stream)
        found.append(Graph(executable, keep))

    def replay(self, graph: Graph) -> None:
        self._call(self.driver.cuGraphLaunch, graph.handle, self.stream)

    def seconds(self, work: Callable[[], object]) -> float:
        """GPU time of what `work` queues."""
        flag = self.driver.CUevent_flags.CU_EVENT_DEFAULT
        begin, end = (self._call(self.driver.cuEventCreate, flag) for _ in range(2))
        self._call(self.driver.cuEventRecord, begin, self.stream)
        work()
        self._call(self.driver.cuEventRecord, end, self.stream)
        self._call(self.driver.cuEventSynchronize, end)
        return float(self._call(self.driver.cuEventElapsedTime, begin, end)) / 1e3


def architecture(capability: tuple[int, int]) -> str:
    """What kernels are compiled for: the device's own, with Hopper's own instructions there unless
    QUANTBENCH_CUDA_PORTABLE=1 asks for those that every GPU has. Raises DependencyError for a GPU older than sm_80."""
    number = capability[0] * 10 + capability[1]
    if number < 80:
        raise DependencyError(f"--device cuda: this GPU is sm_{number}; kernels need sm_80 (Ampere) or newer")
    portable = os.environ.get("QUANTBENCH_CUDA_PORTABLE", "0") != "0"
    return "sm_90a" if number == 90 and not portable else f"sm_{number}"


def _argument(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return ctypes.c_uint64(value.pointer)
    if value is None:
        return ctypes.c_uint64(0)
    if isinstance(value, int):
        return ctypes.c_int32(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, np.generic):
        return np.asarray(value)
    return value


def _address(value: Any) -> int:
    if isinstance(value, TensorMap):
        return int(value.map.getPtr())
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    return ctypes.addressof(value)


def _three(dims: Dims) -> tuple[int, int, int]:
    sizes = (dims,) if isinstance(dims, int) else dims
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
