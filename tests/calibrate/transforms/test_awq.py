from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.choose import choose_block
from quantbench.calibrate.transforms import hessian_taps
from quantbench.errors import CalibrationError, RecipeError
from quantbench.infer.models import LINEARS
from quantbench.quantizers.awq import AwqGrid, Reader, awq_scale
from quantbench.quantizers.output_loss import output_loss, round_trip
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, LayerPlan, VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

AWQ = {"awq": {"steps": 8}}


def choose(plan: VariantPlan, **options: object) -> ScaleTable:
    w = weights()
    return choose_block(LAYER, w, statistics(w, hessian=True), plan, CONFIG, **options)  # type: ignore[arg-type]


def rows(taps: Collection[str]) -> dict[str, np.ndarray]:
    return {tap: forward(hidden(1), weights())[1][tap].astype(np.float32) for tap in taps}


def transforms(table: ScaleTable) -> dict[str, np.ndarray]:
    return {e.name.removeprefix(f"{PREFIX}."): e.scale for e in table if e.kind == "transform"}


def errors(table: ScaleTable, plan: VariantPlan) -> dict[str, float]:
    """Output error by tap of linears rounded to nearest behind the transforms, relative to the outputs."""
    found = dict.fromkeys(SMOOTH_TARGETS, 0.0)
    folded = fold_block(LAYER, weights(), table, CONFIG)
    taps = forward(hidden(1), folded)[1]
    for line in LINEARS:
        weight, x = folded[f"{line.name}.weight"], taps[line.tap]
        rounded = round_trip(weight, plan.layers[f"{PREFIX}.{line.name}"])
        found[line.tap] += float(np.square(x @ (rounded - weight).T).sum() / np.square(x @ weight.T).sum())
    return found


def test_one_input_gets_the_factors_that_the_search_finds() -> None:
    plan, w = variant("weight_only_int4", {"awq": {"steps": 8, "targets": ["down_in"]}}), weights()
    table, seen = choose(plan), statistics(w, hessian=True)
    name = f"{PREFIX}.mlp.down_proj"

    def rounded(x: np.ndarray) -> np.ndarray:
        return round_trip(x, plan.layers[name])

    wanted = awq_scale([Reader(name, w["mlp.down_proj.weight"], rounded)], seen["down_in"], AwqGrid(8))
    entry = table[f"{PREFIX}.mlp.up_proj.smooth"]
    assert np.array_equal(entry.scale, wanted.factors)
    assert entry.observer == "awq"
    assert entry.reason.startswith("AWQ alpha ")
    assert "output error of down_proj 0." in entry.reason


def test_every_input_is_scaled_and_none_gets_worse() -> None:
    plan = variant("weight_only_int4", AWQ)
    table = choose(plan)
    assert set(transforms(table)) == {
        "input_layernorm.smooth", "self_attn.v_proj.smooth", "post_attention_layernorm.smooth", "mlp.up_proj.smooth",
    }  # fmt: skip
    scaled, plain = errors(table, plan), errors(ScaleTable(), plan)
    assert sum(scaled.values()) < 0.8 * sum(plain.values())
    assert all(scaled[tap] < 1.1 * plain[tap] for tap in scaled)  # searched on two batches, measured on one


@pytest.mark.parametrize("mode", ["weight_only_int4", "weight_only_int8", "a8w8", "a8w8_fp8"])
def test_the_float_block_is_unchanged(mode: str) -> None:
    table = choose(variant(mode, AWQ), sample=rows)
    w = weights()
    plain, folded = forward(hidden(5), w)[0], forward(hidden(5), fold_block(LAYER, w, table, CONFIG))[0]
    assert np.abs(folded - plain).max() <= 1e-4 * np.abs(plain).max()


def test_factors_of_o_proj_are_tied_over_the_query_heads_of_a_kv_head() -> None:
    factors = transforms(choose(variant("weight_only_int4", AWQ)))["self_attn.v_proj.smooth"]
    assert factors.shape == (CONFIG.num_kv_heads * CONFIG.head_dim,)
    assert len(np.unique(factors)) > 10


def test_quantized_inputs_are_searched_on_rows() -> None:
    plan = variant("a8w8", AWQ, dynamic=True)
    table = choose(plan, sample=rows)
    assert len(transforms(table)) == 4
    assert hessian_taps(plan) == set()
    with pytest.raises(CalibrationError, match="a search tries its candidates on rows of attn_in"):
        choose(plan)


def test_weights_with_float_inputs_need_the_hessian_only() -> None:
    plan = variant("weight_only_int4", {"awq": {"targets": ["mlp_in"]}})
    assert hessian_taps(plan) == {"mlp_in"}
    w = weights()
    with pytest.raises(CalibrationError, match="awq needs the Hessian of its input: collect it"):
        choose_block(LAYER, w, statistics(w), plan, CONFIG)


def test_linears_left_wide_are_not_scaled() -> None:
    plan = variant("weight_only_int4", AWQ)
    name = f"{PREFIX}.mlp.down_proj"
    plan.layers[name] = LayerPlan(name, "bfloat16")
    assert "mlp.up_proj.smooth" not in transforms(choose(plan))


def test_clip_after_awq_beats_awq_alone() -> None:
    def loss(*words: dict[str, object]) -> float:
        from quantbench.quantizers.weight import dequantize_weight, quantize_weight

        w, table = weights(), choose(variant("weight_only_int4", *words))
        folded = fold_block(LAYER, w, table, CONFIG)
        behind, total = forward(hidden(1), folded)[1], 0.0
        for line in LINEARS:
            weight, x = folded[f"{line.name}.weight"], behind[line.tap]
            rounded = dequantize_weight(quantize_weight(weight, table[f"{PREFIX}.{line.name}.weight"]))
            total += output_loss(weight, rounded, x.T @ x) / output_loss(weight, 0 * weight, x.T @ x)
        return total

    assert loss(AWQ, {"clip": {}}) < loss(AWQ) < loss()


def test_unknown_options_are_listed() -> None:
    with pytest.raises(RecipeError, match="unknown awq option 'alpha'"):
        choose(variant("weight_only_int4", {"awq": {"alpha": 0.5}}))
