from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.calibrate.apply import STORAGE, apply_block, fold_block, tap_factors, transformed
from quantbench.calibrate.choose import choose_block
from quantbench.errors import CalibrationError, CheckpointError
from quantbench.infer.models import LINEARS, block_tensors
from quantbench.quantizers.gptq import gptq
from quantbench.quantizers.methods import METHODS
from quantbench.quantizers.pack import pack_int32
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.scales.arrays import Array
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

F32 = np.float32
ALL = {"smooth": {"alpha": 0.6, "targets": list(SMOOTH_TARGETS)}}


def run(plan: VariantPlan) -> tuple[dict[str, Array], ScaleTable]:
    w = weights()
    table = choose_block(LAYER, w, statistics(w), plan, CONFIG)
    return apply_block(LAYER, w, table, plan, CONFIG), table


def parts(plan: VariantPlan, linear: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = f"{PREFIX}.{linear}."
    return {n.removeprefix(prefix): (str(a.dtype), a.shape) for n, a in run(plan)[0].items() if n.startswith(prefix)}


CODES8, SCALE = ("int8", (64, 96)), ("float32", (64, 1))
FP8, ONE, SHAPE = ("float8_e4m3fn", (64, 96)), ("float32", (1,)), ("int64", (2,))
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a8w8", {}, {"weight": CODES8, "weight_scale": SCALE, "input_scale": ONE}),
    ("a8w8", {"dynamic": True}, {"weight": CODES8, "weight_scale": SCALE}),
    ("a8w8_fp8", {}, {"weight": FP8, "weight_scale": ONE, "input_scale": ONE}),
    ("a8w8_fp8", {"granularity": "block", "dynamic": True}, {"weight": FP8, "weight_scale": ("float32", (1, 1))}),
    ("weight_only_int8", {}, {"weight_packed": ("int32", (64, 24)), "weight_scale": SCALE, "weight_shape": SHAPE}),
    (
        "weight_only_int4",
        {"symmetric": False},
        {
            "weight_packed": ("int32", (64, 12)),
            "weight_scale": ("float32", (64, 3)),
            "weight_shape": SHAPE,
            "weight_zero_point": ("int32", (8, 3)),
        },
    ),
    ("bf16", {}, {"weight": ("bfloat16", (64, 96))}),
]


@pytest.mark.parametrize(("mode", "fields", "expected"), LAYOUTS)
def test_names_dtypes_and_shapes(mode: str, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parts(variant(mode, **fields), "mlp.down_proj") == expected


def test_cache_scales_and_float_tensors() -> None:
    tensors, table = run(variant("a8w8c8"))
    assert tensors[f"{PREFIX}.self_attn.k_scale"].shape == (2, 1, 1)
    assert np.array_equal(tensors[f"{PREFIX}.self_attn.v_scale"].ravel(), table[f"{PREFIX}.self_attn.v_cache"].scale)
    assert tensors[f"{PREFIX}.self_attn.q_proj.bias"].dtype == ml_dtypes.bfloat16


def test_a_dynamic_cache_has_no_tensors() -> None:
    tensors, _ = run(variant("a8w8c8_dynamic"))
    assert not [name for name in tensors if name.endswith(("k_scale", "v_scale"))]


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_float_variant_is_a_cast_of_every_tensor(dtype: str) -> None:
    tensors, _ = run(variant("bf16", dtype=dtype))
    assert set(tensors) == {f"{PREFIX}.{name}" for name in block_tensors(CONFIG)}
    for name, value in weights().items():
        assert np.array_equal(tensors[f"{PREFIX}.{name}"], value.astype(STORAGE[dtype]))


def test_codes_are_those_of_the_folded_weight_under_the_tables_scale() -> None:
    tensors, table = run(variant("a8w8", ALL))
    folded = fold_block(LAYER, weights(), table, CONFIG)
    for line in LINEARS:
        expected = quantize_weight(folded[f"{line.name}.weight"], table[f"{PREFIX}.{line.name}.weight"])
        assert np.array_equal(tensors[f"{PREFIX}.{line.name}.weight"], expected.codes)
        assert tensors[f"{PREFIX}.{line.name}.input_scale"] == table[f"{PREFIX}.{line.name}.input"].scale


@pytest.mark.parametrize("target", [*([t] for t in SMOOTH_TARGETS), list(SMOOTH_TARGETS)], ids=str)
def test_transforms_leave_the_float_block_unchanged(target: list[str]) -> None:
    w = weights()
    plan = variant("a8w8", {"smooth": {"alpha": 0.7, "targets": target}})
    table = choose_block(LAYER, w, statistics(w), plan, CONFIG)
    folded = fold_block(LAYER, w, table, CONFIG)
    assert any(not np.array_equal(folded[n], w[n]) for n in w)
    assert sum(e.kind == "transform" for e in table) == len(target)
    plain, smooth = forward(hidden(5), w)[0], forward(hidden(5), folded)[0]
    assert np.abs(smooth - plain).max() <= 1e-4 * np.abs(plain).max()


def test_a_folded_norm_is_stored_without_rounding() -> None:
    tensors, table = run(variant("a8w8", {"smooth": {}}))
    folded = fold_block(LAYER, weights(), table, CONFIG)
    name = "input_layernorm.weight"
    assert tensors[f"{PREFIX}.{name}"].astype(F32) == pytest.approx(folded[name], rel=1e-6)


def test_taps_change_as_the_factors_say() -> None:
    w = weights()
    table = choose_block(LAYER, w, statistics(w), variant("a8w8", ALL), CONFIG)
    plain, smooth = forward(hidden(5), w)[1], forward(hidden(5), fold_block(LAYER, w, table, CONFIG))[1]
    factors = tap_factors(LAYER, table, CONFIG)
    assert set(factors) == {"attn_in", "o_in", "mlp_in", "down_in", "v"}
    for tap, x in plain.items():
        assert smooth[tap] == pytest.approx(x * factors.get(tap, 1), rel=1e-3, abs=1e-5)


def test_derived_statistics_are_those_of_the_folded_block() -> None:
    w = weights()
    table = choose_block(LAYER, w, statistics(w), variant("a8w8", ALL), CONFIG)
    derived = transformed(LAYER, statistics(w, hessian=True), table, CONFIG)
    seen = statistics(fold_block(LAYER, w, table, CONFIG), hessian=True)
    for tap, s in seen.items():
        assert derived[tap].absmax == pytest.approx(s.absmax, rel=1e-4)
        if s.hessian is not None:
            assert derived[tap].hessian == pytest.approx(s.hessian, rel=1e-3, abs=1e-3)


def test_quantized_weights_are_near_the_float_ones() -> None:
    tensors, _ = run(variant("a8w8"))
    for line in LINEARS:
        prefix = f"{PREFIX}.{line.name}"
        decoded = tensors[f"{prefix}.weight"].astype(F32) * tensors[f"{prefix}.weight_scale"]
        original = weights()[f"{line.name}.weight"]
        assert np.all(np.abs(decoded - original) <= 0.5001 * tensors[f"{prefix}.weight_scale"])


def test_an_absent_entry_is_named() -> None:
    w = weights()
    with pytest.raises(CheckpointError, match=r"no entry 'model.layers.2.self_attn.q_proj.weight'"):
        apply_block(LAYER, w, ScaleTable(), variant("a8w8"), CONFIG)


def test_floats_that_do_not_fit_are_refused() -> None:
    w = weights()
    w["self_attn.q_proj.bias"][3] = 1e6
    with pytest.raises(
        CalibrationError, match=r"q_proj.bias: values up to 1e\+06 overflow float16; store floats as bfloat16"
    ):
        apply_block(LAYER, w, ScaleTable(), variant("fp16", dtype="float16"), CONFIG)


def test_nan_in_what_stays_float_is_refused() -> None:
    w = weights()
    w["input_layernorm.weight"][1] = np.nan
    with pytest.raises(CalibrationError, match=r"model.layers.2.input_layernorm.weight: 1 of 64 values are NaN"):
        apply_block(LAYER, w, ScaleTable(), variant("bf16"), CONFIG)


def test_every_method_runs_or_says_that_it_needs_a_hessian() -> None:
    w = weights()
    for name in METHODS:
        plan = variant("weight_only_int4", method=name)
        table = choose_block(LAYER, w, statistics(w), plan, CONFIG)
        tensors = apply_block(LAYER, w, table, plan, CONFIG, statistics(w, hessian=True))
        assert f"{PREFIX}.mlp.up_proj.weight_packed" in tensors
        if METHODS[name].needs_hessian:
            with pytest.raises(CalibrationError, match=f"method {name} needs the Hessian of its input: collect it"):
                apply_block(LAYER, w, table, plan, CONFIG, statistics(w))


def test_decoded_codes_are_what_dequantize_weight_gives() -> None:
    tensors, table = run(variant("a8w8_fp8"))
    name = "mlp.gate_proj"
    expected = dequantize_weight(quantize_weight(weights()[f"{name}.weight"], table[f"{PREFIX}.{name}.weight"]))
    decoded = tensors[f"{PREFIX}.{name}.weight"].astype(F32) * tensors[f"{PREFIX}.{name}.weight_scale"]
    assert np.array_equal(decoded, expected)


def test_a_methods_settings_reach_it() -> None:
    w = weights()
    seen = statistics(w, hessian=True)
    for act_order in (True, False):
        plan = variant("weight_only_int4", method="gptq", options=(("act_order", act_order), ("damping", (0.5,))))
        table = choose_block(LAYER, w, seen, plan, CONFIG)
        name = "mlp.down_proj"
        packed = apply_block(LAYER, w, table, plan, CONFIG, seen)[f"{PREFIX}.{name}.weight_packed"]
        expected = gptq(w[f"{name}.weight"], table[f"{PREFIX}.{name}.weight"], seen["down_in"], act_order, (0.5,))
        assert np.array_equal(packed, pack_int32(expected.codes, 4))
