"""The device: memory (memory.py), compiled kernels, launches, graphs and timing, on one stream.

Launches are programmatic (PDL) on sm_90 and newer: a kernel may start while its predecessor ends, reads weights, and
waits for the predecessor with griddepcontrol.wait before it touches anything else. Every kernel here does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.errors import DependencyError, unknown
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.compile import cubin, load_nvrtc
from quantbench.infer.cuda.memory import Memory

Dims = int | tuple[int, ...]
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "exact": np.dtype(np.float32),
}
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


class Device(Memory):
    """One GPU. `dtype` is what arrays between operations hold: float32 (as the CPU runtime), bfloat16 or
    float16; "exact" is float32 with every sum of floats in double: results do not depend on the order of the terms, so
    they are those of the numpy reference, but for one rounding in many millions."""

    exact = False

    def __init__(self, dtype: str = "float32", index: int = 0) -> None:
        """Raises DependencyError without a usable GPU, compiler or architecture, and for an unknown dtype."""
        if dtype not in DTYPES:
            raise DependencyError(unknown("activation dtype", dtype, DTYPES))
        self.dtype, self.exact = DTYPES[dtype], dtype == "exact"
        load_nvrtc()
        super().__init__(index)
        self.arch = architecture(self.capability)
        self.hopper = self.arch == "sm_90a"
        self.pdl = self.capability >= (9, 0) and os.environ.get("QUANTBENCH_CUDA_PDL", "1") != "0"
        self.section = ""  # what is being launched, for profiles
        self._timing: list[tuple[str, Any]] | None = None
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._configs: dict[tuple[Any, ...], Any] = {}

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
        self._enter()
        (status,) = self.driver.cuLaunchKernelEx(config, kernel.handle, ctypes.addressof(addresses), 0)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise DependencyError(
                f"kernel {kernel.name} cannot be launched ({status.name}): grid {grid}, block {block}, shared {shared}"
            )
        self.mark(kernel.name)

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

    def mark(self, name: str) -> None:
        """Says that a kernel was queued, where launches are being timed."""
        if self._timing is not None:
            self._timing.append((f"{self.section} {name}".strip(), self._event()))

    def _event(self) -> Any:
        event = self._call(self.driver.cuEventCreate, self.driver.CUevent_flags.CU_EVENT_DEFAULT)
        self._call(self.driver.cuEventRecord, event, self.stream)
        return event

    def timed(self, work: Callable[[], None]) -> list[tuple[str, float]]:
        """Name and seconds of every kernel that `work` queues, each alone: the stream is held until all are queued."""
        pdl, self.pdl = self.pdl, False
        self.launch(self.kernel("bench.cu", "pause", KIND=4), 1, 1, np.int64(200_000_000))
        self._timing = [("", self._event())]
        try:
            work()
            self.synchronize()
            events = self._timing
        finally:
            self._timing, self.pdl = None, pdl
        return [(name, self._elapsed(before, event)) for (_, before), (name, event) in pairwise(events)]

    def _elapsed(self, begin: Any, end: Any) -> float:
        return float(self._call(self.driver.cuEventElapsedTime, begin, end)) / 1e3

    def seconds(self, work: Callable[[], None]) -> float:
        """GPU time of what `work` queues."""
        begin = self._event()
        work()
        end = self._event()
        self._call(self.driver.cuEventSynchronize, end)
        return self._elapsed(begin, end)


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
    if isinstance(value, np.generic):  # before float: a numpy float64 is one, and stays eight bytes
        return np.asarray(value)
    if isinstance(value, int):
        return ctypes.c_int32(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
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
