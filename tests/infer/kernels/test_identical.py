"""What must not change a bit: the instruction set (int8), the number of tokens beside one, the number of threads."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.cpu import CpuOps, available_isas, load_kernels
from quantbench.quantizers.weight import QuantizedWeight

RNG = np.random.default_rng(0)
N, K = 100, 388


def weights() -> dict[str, LinearWeight]:
    floats = RNG.standard_normal((N, K)).astype(np.float32)
    int8 = RNG.integers(-127, 128, (N, K)).astype(np.int8)
    int4 = RNG.integers(-8, 8, (N, 384)).astype(np.int8)
    channel = RNG.uniform(0.01, 0.1, (N, 1)).astype(np.float32)
    group = RNG.uniform(0.01, 0.1, (N, 12)).astype(np.float32)
    zero = RNG.integers(-8, 8, (N, 12)).astype(np.int32)
    e4m3 = floats.astype(ml_dtypes.float8_e4m3fn)
    return {
        "fp32": LinearWeight("w", floats, channel[:, 0]),
        "bf16": LinearWeight("w", floats.astype(ml_dtypes.bfloat16), None),
        "fp16": LinearWeight("w", floats.astype(np.float16), None),
        "a8w8": LinearWeight("w", QuantizedWeight("int8", "channel", int8, channel), channel[:, 0], "int8"),
        "w8": LinearWeight("w", QuantizedWeight("int8", "channel", int8, channel), None),
        "w4": LinearWeight("w", QuantizedWeight("int4", "group", int4, group, zero, 32), None),
        "fp8": LinearWeight(
            "w", QuantizedWeight("fp8_e4m3", "block", e4m3, np.ones((1, 4), np.float32)), None, "fp8_e4m3"
        ),
    }


WEIGHTS = weights()


def columns(weight: LinearWeight) -> int:
    array = weight.weight if isinstance(weight.weight, np.ndarray) else weight.weight.codes
    return int(array.shape[1])


def inputs(ops: CpuOps, weight: LinearWeight, tokens: int) -> Activation:
    x = np.random.default_rng(1).standard_normal((tokens, columns(weight))).astype(np.float32)
    return ops.quantize(x, ActSpec(weight.activations))


@pytest.mark.parametrize("kind", ["a8w8", "w8"])
@pytest.mark.parametrize("tokens", [1, 4, 13, 27])
def test_int8_results_are_the_same_on_every_instruction_set(tokens: int, kind: str) -> None:
    results = []
    for isa in available_isas():
        ops = CpuOps(isa)
        a = inputs(ops, WEIGHTS[kind], tokens)
        results.append((a.codes if a.codes is not None else a.values, a.scale, ops.linear(a, ops.pack(WEIGHTS[kind]))))
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_token_alone_and_in_a_batch(kind: str, isa: str) -> None:
    """Batches of 1, 2, 5 and 60 take different tiles and the blocked path, and must agree bit for bit."""
    ops = CpuOps(isa)
    weight = WEIGHTS[kind]
    packed, a = ops.pack(weight), inputs(ops, weight, 60)
    whole = ops.linear(a, packed)
    for rows in (slice(0, 1), slice(7, 9), slice(20, 25), slice(59, 60)):
        part = Activation(
            None if a.values is None else a.values[rows],
            None if a.codes is None else a.codes[rows],
            None if a.scale is None else a.scale[rows],
            a.format,
        )
        assert np.array_equal(ops.linear(part, packed), whole[rows])


def test_threads_do_not_change_results() -> None:
    ops = CpuOps()
    before = load_kernels().threads()
    wide = LinearWeight("w", RNG.standard_normal((1000, 300)).astype(np.float32), None)
    x = RNG.standard_normal((33, 300)).astype(np.float32)
    results = []
    try:
        for threads in (1, 2, 5):
            assert ops.set_threads(threads) == threads
            a = ops.quantize(x, ActSpec("int8", None, keep_float=True))
            results.append((a.codes, ops.linear(Activation(x), ops.pack(wide)), ops.silu_mul(x).values))
    finally:
        ops.set_threads(before)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
