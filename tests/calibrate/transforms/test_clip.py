from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block, fold_block
from quantbench.calibrate.choose import choose_block
from quantbench.calibrate.transforms import hessian_taps
from quantbench.errors import CalibrationError, RecipeError
from quantbench.infer.models import LINEARS
from quantbench.quantizers.autoclip import ClipGrid, clip_range
from quantbench.quantizers.output_loss import output_loss
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, statistics, variant, weights

CLIP = {"clip": {}}


def choose(plan: VariantPlan, **options: object) -> ScaleTable:
    w = weights()
    return choose_block(LAYER, w, statistics(w, hessian=True), plan, CONFIG, **options)  # type: ignore[arg-type]


def error(table: ScaleTable) -> float:
    """Output error of all linears, rounded to nearest under the table's weight scales, inputs as in float."""
    w = weights()
    seen, folded = statistics(w, hessian=True), fold_block(LAYER, w, table, CONFIG)
    total = 0.0
    for line in LINEARS:
        weight, hessian = folded[f"{line.name}.weight"], seen[line.tap].hessian
        rounded = dequantize_weight(quantize_weight(weight, table[f"{PREFIX}.{line.name}.weight"]))
        assert hessian is not None
        total += output_loss(weight, rounded, hessian) / output_loss(weight, np.zeros_like(weight), hessian)
    return total


def test_clip_decides_the_ranges_that_its_search_finds() -> None:
    plan, w = variant("weight_only_int4", {"clip": {"max_shrink": 0.4, "steps": 10}}), weights()
    table, seen = choose(plan), statistics(w, hessian=True)
    for line in LINEARS:
        name = f"{PREFIX}.{line.name}"
        wanted = clip_range(w[f"{line.name}.weight"], plan.layers[name], seen[line.tap], ClipGrid(0.4, 10))
        assert np.array_equal(table[f"{name}.weight"].absmax, wanted.absmax)
        assert table[f"{name}.weight"].observer == "clip"
    assert table[f"{PREFIX}.mlp.down_proj.weight"].reason == "clip, least output error by the Hessian for 192 groups"


def test_clip_beats_the_whole_range_and_the_full_hessian_its_diagonal() -> None:
    words = ((), ({"clip": {"hessian": "diagonal"}},), (CLIP,))
    plain, diagonal, full = (error(choose(variant("weight_only_int4", *w))) for w in words)
    assert full < diagonal < 0.95 * plain


def test_clip_works_only_on_its_targets() -> None:
    table, plain = (
        choose(variant("weight_only_int4", {"clip": {"targets": ["mlp_in"]}})),
        choose(variant("weight_only_int4")),
    )
    clipped = [e.name for e in table if e.observer == "clip"]
    assert clipped == [f"{PREFIX}.mlp.gate_proj.weight", f"{PREFIX}.mlp.up_proj.weight"]
    assert all(np.array_equal(e.scale, plain[e.name].scale) for e in table if e.name not in clipped)


def test_clip_sees_the_weights_behind_the_smoothing() -> None:
    smooth = {"smooth": {"alpha": 0.5}}
    table = choose(variant("a8w8", smooth, CLIP))
    folded = fold_block(LAYER, weights(), table, CONFIG)
    for line in LINEARS:
        entry = table[f"{PREFIX}.{line.name}.weight"]
        assert np.all(entry.absmax <= np.abs(folded[f"{line.name}.weight"]).max(axis=1, keepdims=True) * (1 + 1e-6))
        assert np.all(entry.absmax >= np.abs(folded[f"{line.name}.weight"]).max(axis=1, keepdims=True) * 0.49)


def test_clip_keeps_per_tensor_fp8_scales_tied() -> None:
    table = choose(variant("a8w8_fp8", CLIP))
    q, k, v = (table[f"{PREFIX}.self_attn.{p}_proj.weight"] for p in "qkv")
    assert q.scale == k.scale == v.scale
    assert q.reason.endswith("the largest of q_proj, k_proj, v_proj")


def test_gptq_rounds_under_the_ranges_of_clip_and_both_beat_one() -> None:
    w, losses = weights(), {}
    seen = statistics(w, hessian=True)
    for method in ("rtn", "gptq"):
        for words in ((), (CLIP,)):
            plan = variant("weight_only_int4", *words, method=method)
            table = choose(plan)
            stored = apply_block(LAYER, w, table, plan, CONFIG, seen)
            assert np.array_equal(
                stored[f"{PREFIX}.mlp.up_proj.weight_scale"].astype(np.float32),
                table[f"{PREFIX}.mlp.up_proj.weight"].scale,
            )
            losses[method, bool(words)] = error_of(stored, plan)
    assert losses["gptq", True] < losses["rtn", True] < losses["rtn", False]
    assert losses["gptq", True] < losses["gptq", False]


def error_of(stored: dict[str, np.ndarray], plan: VariantPlan) -> float:
    """Output error of all linears of one block as stored."""
    from quantbench.quantizers.pack import unpack_int32

    w = weights()
    seen, total = statistics(w, hessian=True), 0.0
    for line in LINEARS:
        weight, hessian = w[f"{line.name}.weight"], seen[line.tap].hessian
        assert hessian is not None
        codes = unpack_int32(stored[f"{PREFIX}.{line.name}.weight_packed"], 4, weight.shape[1])
        scale = np.repeat(stored[f"{PREFIX}.{line.name}.weight_scale"].astype(np.float32), 32, axis=1)
        total += output_loss(weight, codes * scale, hessian) / output_loss(weight, 0 * weight, hessian)
    return total


def test_clip_asks_for_hessians_and_says_where_one_is_missing() -> None:
    assert hessian_taps(variant("weight_only_int4", CLIP)) == {"attn_in", "o_in", "mlp_in", "down_in"}
    assert hessian_taps(variant("a8w8", {"smooth": {}}, {"clip": {"targets": ["o_in"]}})) == {"o_in"}
    w = weights()
    with pytest.raises(CalibrationError, match=r"model.layers.2.self_attn.q_proj: clip needs the Hessian of its input"):
        choose_block(LAYER, w, statistics(w), variant("weight_only_int4", CLIP), CONFIG)
    with pytest.raises(RecipeError, match="unknown clip option 'shrink'"):
        choose(variant("weight_only_int4", {"clip": {"shrink": 0.1}}))


@pytest.mark.parametrize("damage", ["zeros", "dead channel", "outlier", "rank 1"])
def test_clip_of_dull_inputs(damage: str) -> None:
    w, plan = weights(), variant("weight_only_int4", CLIP)
    seen = statistics(w, hessian=True)
    h = seen["mlp_in"].hessian
    assert h is not None
    if damage == "zeros":
        w["mlp.up_proj.weight"][:] = 0
    elif damage == "outlier":
        w["mlp.up_proj.weight"][3, 4] = 1e4
    else:
        x = np.random.default_rng(0).standard_normal(len(h))
        h = np.outer(x, x) if damage == "rank 1" else h * (np.arange(len(h)) != 7) * (np.arange(len(h)) != 7)[:, None]
        seen["mlp_in"] = replace(seen["mlp_in"], hessian=h)
    entry = choose_block(LAYER, w, seen, plan, CONFIG)[f"{PREFIX}.mlp.up_proj.weight"]
    assert np.all(np.isfinite(entry.scale))
    assert np.all(entry.scale > 0)
