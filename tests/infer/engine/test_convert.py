from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.engine import Engine
from quantbench.infer.engine.convert import cast, convert, float_dtype, round_to_nearest
from quantbench.infer.ops import load_ops
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight
from quantbench.vocabulary import parse_mode

MODES = ("bf16", "fp16", "weight_only_int8", "weight_only_int4", "a8w8", "a8w8_fp8")


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("format", "columns", "granularity", "scales", "group"),
    [
        ("int8", 96, "channel", (5, 1), None),
        ("fp8_e4m3", 96, "tensor", (1,), None),
        ("int4", 256, "group", (5, 2), 128),
        ("int4", 192, "group", (5, 3), 64),
        ("int4", 96, "group", (5, 3), 32),
        ("int4", 40, "channel", (5, 1), None),
    ],
)
def test_ranges_are_taken_at_the_default_granularity(
    format: str, columns: int, granularity: str, scales: tuple[int, ...], group: int | None
) -> None:
    q = round_to_nearest(weight(5, columns), format)
    assert (q.format, q.granularity, q.scale.shape, q.group_size) == (format, granularity, scales, group)


@given(st.integers(1, 6), st.sampled_from([32, 40, 96, 128]), st.sampled_from(["int8", "int4"]), st.integers(0, 99))
def test_integers_are_off_by_half_a_step_at_most(rows: int, columns: int, format: str, seed: int) -> None:
    w = weight(rows, columns, seed)
    q = round_to_nearest(w, format)
    step = np.repeat(q.scale, columns // q.scale.shape[1], axis=1)
    error = np.abs(dequantize_weight(q) - w)
    clipped = w / step > (127 if format == "int8" else 7)
    assert (error <= 0.5001 * step)[~clipped].all()


@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 99), st.sampled_from([1e-39, 1e-3, 1.0, 1e30]))
def test_kernels_round_as_numpy_does(rows: int, columns: int, seed: int, size: float) -> None:
    w = weight(rows, columns, seed) * np.float32(size)
    w[0, 0] = 0.0
    native, plain = round_to_nearest(w, "int8", load_ops("cpu")), round_to_nearest(w, "int8")
    assert native.codes.tobytes() == plain.codes.tobytes()
    assert native.scale.tobytes() == plain.scale.tobytes()
    assert native.scale.shape == plain.scale.shape


def test_a_weight_that_is_not_finite_is_called_a_weight() -> None:
    w = weight(3, 64)
    w[1, 2] = np.nan
    with pytest.raises(CalibrationError, match="int8: a range is NaN"):
        round_to_nearest(w, "int8", load_ops("cpu"))


def test_a_row_of_zeros_stays_zero() -> None:
    w = weight(3, 64)
    w[1] = 0
    for format in ("int8", "int4", "fp8_e4m3"):
        assert not dequantize_weight(round_to_nearest(w, format))[1].any()


def test_a_cast_rounds_weight_and_bias_alike() -> None:
    bias = np.array([1.001, 2.003], np.float32)
    linear = cast(LinearWeight("x", weight(2, 8), bias), np.dtype(ml_dtypes.bfloat16))
    assert linear.weight.dtype == ml_dtypes.bfloat16
    assert linear.bias is not None
    assert linear.bias.dtype == np.float32
    assert np.array_equal(linear.bias, bias.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_makes_of_a_linear(mode: str) -> None:
    linear = convert(LinearWeight("x", weight(4, 64), None), parse_mode(mode))
    assert linear.activations == parse_mode(mode).activations
    assert linear.input_scale is None  # dynamic
    if parse_mode(mode).quantized:
        assert isinstance(linear.weight, QuantizedWeight)
        assert float_dtype(parse_mode(mode)) == ml_dtypes.bfloat16
    else:
        assert linear.weight.dtype == float_dtype(parse_mode(mode))


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [("fp16", 0, 5e-3), ("bf16", 1e-4, 5e-2), ("weight_only_int8", 1e-3, 0.1), ("a8w8", 1e-3, 0.1),
     ("weight_only_int4", 1e-2, 0.7), ("a8w8_fp8", 5e-3, 0.3)],  # unrelated logits differ by 1.4
)  # fmt: skip
def test_every_mode_runs_near_float(mode: str, low: float, high: float, load: Callable[..., Engine]) -> None:
    ids = np.random.default_rng(5).integers(0, 97, 60).tolist()
    float_logits, engine = load("qwen2").score(ids), load("qwen2", mode)
    error = float(np.linalg.norm(engine.score(ids) - float_logits) / np.linalg.norm(float_logits))
    assert low < error < high
    assert engine.runner.cache.layers[0].k.dtype.itemsize == 2


def test_a_model_as_stored_is_the_model_in_its_own_mode(load: Callable[..., Engine]) -> None:
    stored, asked = load("llama_bfloat16"), load("llama_bfloat16", "bf16")
    assert stored.mode == asked.mode
    assert stored.memory == asked.memory
    assert np.array_equal(stored.score([1, 2, 3]), asked.score([1, 2, 3]))
    assert load("llama_bfloat16", "fp32").memory["weights_bytes"] > 1.9 * stored.memory["weights_bytes"]
