"""From logits to tokens and log-probabilities, without moving the logits: launchers of kernels/sample.cu."""

from __future__ import annotations

import numpy as np

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import DTYPES, F32

PARTS = 64  # blocks that share the search through one row of logits, at most
I32 = np.dtype(np.int32)


def argmax(device: Device, logits: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
    """i32[R]: the largest of each row of logits f32[R, V]; of equal ones the lowest id. Written to `out` if given.

    All three operations set bit 2 of `device.bad` where a row holds NaN or has no finite largest logit.
    """
    rows, vocabulary = logits.shape
    parts = min(PARTS, -(-vocabulary // 1024), max(1, 4 * device.multiprocessors // rows))
    best = device.empty((rows, parts), np.dtype(np.uint64))
    ids = out or device.empty((rows,), I32)
    device.launch(device.kernel("sample.cu", "argmax_parts"), (parts, rows), 256, logits, vocabulary, best, device.bad)
    device.launch(device.kernel("sample.cu", "argmax_merge"), rows, 32, best, parts, ids, device.bad)
    return ids


def logprobs(device: Device, logits: DeviceArray, targets: DeviceArray) -> DeviceArray:
    """f32[R]: log softmax of each row of logits f32[R, V] at targets i32[R]; the sum in float64."""
    rows, vocabulary = logits.shape
    out = device.empty((rows,), DTYPES[F32])
    device.launch(device.kernel("sample.cu", "logprobs"), rows, 1024, logits, targets, vocabulary, out, device.bad)
    return out


def sample(
    device: Device,
    logits: DeviceArray,
    temperature: DeviceArray,
    top_k: DeviceArray,
    top_p: DeviceArray,
    uniform: DeviceArray,
    out: DeviceArray | None = None,
) -> DeviceArray:
    """i32[R] drawn from logits f32[R, V] as infer/engine/sampling.py does, by one `uniform` f32 in [0, 1) per row.

    temperature 0: the largest; top_k 0 and top_p 1 exclude nothing. Written to `out` i32[R] if given.
    """
    rows, vocabulary = logits.shape
    ids = out or device.empty((rows,), I32)
    kernel = device.kernel("sample.cu", "sample")
    device.launch(kernel, rows, 1024, logits, temperature, top_k, top_p, uniform, vocabulary, ids, device.bad)
    return ids
