"""cuBLASLt, where it is the best matrix multiplication: bf16 and float16 with many tokens (e4m3 only in bench.py).

It comes with the `cuda` extra and is optional: without it our own kernels run every shape, and `quantbench doctor`
says so. Row-major out[T, N] = x[T, K] w[N, K]ᵀ is, to a column-major library, the [N, T] matrix w xᵀ; so the scales
of weight rows go to its A, those of tokens to its B.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import ml_dtypes
import numpy as np

from quantbench.errors import DependencyError
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device

WORKSPACE = 64 << 20
# numbers of cublasLt.h, library_types.h
COMPUTE_F32, SCALE_F32, OUTER_VECTOR = 68, 0, 3
TRANSPOSE_A, A_POINTER, B_POINTER, FAST_ACCUMULATION, A_MODE, B_MODE = 3, 17, 18, 25, 31, 32
TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 2,
    np.dtype(ml_dtypes.bfloat16): 14,
    np.dtype(ml_dtypes.float8_e4m3fn): 28,
}
BEST_FROM: dict[np.dtype[Any], int] = {  # by what it writes: tokens from which steps with it were fastest on an H200
    np.dtype(np.float32): 49,
    np.dtype(ml_dtypes.bfloat16): 129,
    np.dtype(np.float16): 129,
}
ELSEWHERE_FROM = 49  # on GPUs without warpgroup products
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Plan:
    """One shape, made ready: descriptors and the algorithm that the library picked."""

    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]  # w, x, out
    algorithm: Any


class Blas:
    """The library on one device's stream."""

    def __init__(self, device: Device) -> None:
        """Raises DependencyError where the library is not there."""
        self._library = load_library()
        self._device = device
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = device.allocate((WORKSPACE,), np.uint8)
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def matmul(
        self,
        x: DeviceArray,
        w: DeviceArray,
        out: DeviceArray,
        scales: tuple[DeviceArray, DeviceArray] | None = None,
    ) -> None:
        """out[T, N] (f32 or 16-bit) = x[T, K] w[N, K]ᵀ, both bf16, f16, or e4m3 with `scales` f32[N] of weight rows and
        f32[T] of tokens."""
        plan = self._plan(x, w, out)
        if scales is not None:
            for attribute, scale in zip((A_POINTER, B_POINTER), scales, strict=True):
                self._set(plan.description, attribute, ctypes.c_uint64(scale.pointer))
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        first, second, third = plan.layouts
        self._call(
            "cublasLtMatmul", self._handle, plan.description, ctypes.byref(one), _pointer(w), first, _pointer(x),
            second, ctypes.byref(zero), _pointer(out), third, _pointer(out), third, ctypes.byref(plan.algorithm),
            _pointer(self._workspace), ctypes.c_size_t(WORKSPACE), ctypes.c_void_p(int(self._device.stream)),
        )  # fmt: skip
        self._device.mark("cublasLtMatmul")

    def _plan(self, x: DeviceArray, w: DeviceArray, out: DeviceArray) -> Plan:
        key = (x.shape, w.shape, out.shape, x.dtype, out.dtype)
        if key not in self._plans:
            self._plans[key] = self._make(x, w, out)
        return self._plans[key]

    def _make(self, x: DeviceArray, w: DeviceArray, out: DeviceArray) -> Plan:
        description = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), COMPUTE_F32, SCALE_F32)
        self._set(description, TRANSPOSE_A, ctypes.c_int32(1))
        if x.dtype == E4M3:
            for mode in (A_MODE, B_MODE):
                self._set(description, mode, ctypes.c_int32(OUTER_VECTOR))
            for scale in (A_POINTER, B_POINTER):  # any address: the heuristic only asks whether there is one
                self._set(description, scale, ctypes.c_uint64(self._workspace.pointer))
            self._set(description, FAST_ACCUMULATION, ctypes.c_int8(1))
        (tokens, depth), rows = x.shape, w.shape[0]
        layouts = (
            self._layout(w.dtype, depth, rows, depth),
            self._layout(x.dtype, depth, tokens, depth),
            self._layout(out.dtype, rows, tokens, out.shape[1]),
        )
        return Plan(description, layouts, self._pick(description, layouts, (tokens, rows, depth)))

    def _pick(
        self, description: ctypes.c_void_p, layouts: tuple[ctypes.c_void_p, ...], shape: tuple[int, int, int]
    ) -> Any:
        preference, limit, count = ctypes.c_void_p(), ctypes.c_uint64(WORKSPACE), ctypes.c_int()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, 1, ctypes.byref(limit), ctypes.c_size_t(8))
        found = _Heuristic()
        w, x, out = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, description, w, x, out, out, preference, 1,
            ctypes.byref(found), ctypes.byref(count),
        )  # fmt: skip
        if count.value == 0:
            raise DependencyError(
                f"cuBLASLt has no algorithm for tokens, rows, depth = {shape}; uninstall nvidia-cublas"
            )
        return found

    def _layout(self, dtype: np.dtype[Any], rows: int, columns: int, leading: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(leading)
        self._call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), TYPES[dtype], *sizes)
        return layout

    def _set(self, description: ctypes.c_void_p, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call("cublasLtMatmulDescSetAttribute", description, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise DependencyError(f"{name} failed with cuBLAS status {status}; check the driver with `nvidia-smi`")


def load_library() -> ctypes.CDLL:
    """libcublasLt of the nvidia-cublas package, or of an installed CUDA. Raises DependencyError where there is none."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError) as error:
        raise DependencyError(
            "cuBLASLt cannot be loaded; our own kernels run instead, slower for long prompts: pip install nvidia-cublas"
        ) from error


_OPEN: WeakKeyDictionary[Device, Blas | None] = WeakKeyDictionary()


def open_blas(device: Device) -> Blas | None:
    """The library, or None where it is not installed, where QUANTBENCH_CUDA_BLAS=0 forbids it, and on the portable
    path, which stands on our own kernels alone."""
    if device not in _OPEN:
        portable = os.environ.get("QUANTBENCH_CUDA_PORTABLE", "0") != "0"
        forbidden = portable or os.environ.get("QUANTBENCH_CUDA_BLAS", "1") == "0"
        try:
            _OPEN[device] = None if forbidden else Blas(device)
        except DependencyError:
            _OPEN[device] = None
    return _OPEN[device]


def forbid(device: Device) -> None:
    """Our own kernels alone on this device."""
    _OPEN[device] = None


def wins(device: Device, x: DeviceArray, w: DeviceArray, out: DeviceArray) -> bool:
    """Whether the library is there, takes this product, and was measured to be the fastest at this size."""
    if not suits(x, w, out):
        return False
    least = BEST_FROM[out.dtype] if device.hopper else ELSEWHERE_FROM
    return len(x) >= least and open_blas(device) is not None


def suits(x: DeviceArray, w: DeviceArray, out: DeviceArray) -> bool:
    """Whether the library takes a product of 16-bit floats: rows in 16 bytes."""
    aligned = x.shape[1] % 8 == 0 and out.shape[1] % 8 == 0
    return x.dtype == w.dtype and x.dtype.itemsize == 2 and out.dtype in BEST_FROM and aligned


def _pointer(array: DeviceArray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.pointer)
