from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.choose import choose_block, choose_head
from quantbench.errors import CalibrationError, RecipeError
from quantbench.infer.models import LINEARS
from quantbench.scales.lint import errors, lint_table
from quantbench.scales.ranges import range_of
from quantbench.scales.seed import seed_tables
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, LayerPlan, VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

F32 = np.float32
ALL = {"smooth": {"alpha": 0.5, "targets": list(SMOOTH_TARGETS)}}


def choose(plan: VariantPlan, **options: object) -> ScaleTable:
    w = weights()
    return choose_block(LAYER, w, statistics(w), plan, CONFIG, **options)  # type: ignore[arg-type]


def again(factors: dict[str, np.ndarray]) -> dict[str, Statistics]:
    """Really look again: both batches behind the factors."""
    taps = [forward(hidden(seed), weights())[1] for seed in (1, 2)]
    rows = {tap: CONFIG.num_kv_heads if tap in ("k", "v") else 1 for tap in factors}
    return {t: observe(np.concatenate([x[t] for x in taps]).astype(F32) * f, rows[t]) for t, f in factors.items()}


@pytest.mark.parametrize("mode", ["a8w8", "a8w8c8", "a8w8_fp8c8_fp8", "weight_only_int8", "weight_only_int4c8"])
@pytest.mark.parametrize("transforms", [(), (ALL,)], ids=["plain", "smooth"])
def test_every_mode_gives_what_its_plan_needs_without_errors(
    mode: str, transforms: tuple[dict[str, object], ...]
) -> None:
    plan = variant(mode, *transforms)
    table = choose(plan)
    assert errors(lint_table(table, plan)) == []
    assert all(e.reason and np.all(np.isfinite(e.scale)) and np.all(e.scale > 0) for e in table)
    assert all(e.loss is not None and e.loss < 0.05 for e in table if e.kind == "weight")


def test_a_float_variant_decides_nothing() -> None:
    assert not choose(variant("bf16")).entries


def test_static_inputs_are_shared_and_explained() -> None:
    table = choose(variant("a8w8"))
    entries = [table[f"{PREFIX}.self_attn.{p}_proj.input"] for p in "qkv"]
    seen = statistics(weights())["attn_in"]
    assert all(e.scale == seen.absmax / F32(127) and e.absmax == seen.absmax for e in entries)
    assert entries[0].reason == "absmax over 2 batches, 80 tokens, shared by q_proj, k_proj, v_proj"
    x = np.concatenate([forward(hidden(seed), weights())[1]["attn_in"] for seed in (1, 2)]).astype(F32)
    scale = float(entries[0].scale[0])
    real = np.square(np.rint(x / scale) * scale - x).sum() / np.square(x).sum()
    assert entries[0].loss == pytest.approx(real, rel=0.1)


def test_members_with_different_observers_share_the_largest_range() -> None:
    plan = variant("a8w8", observer="percentile")
    name = f"{PREFIX}.mlp.up_proj"
    plan.layers[name] = replace(plan.layers[name], activation_observer="absmax")
    table = choose(plan)
    absmax = statistics(weights())["mlp_in"].absmax
    assert table[f"{PREFIX}.mlp.gate_proj.input"].absmax == table[f"{name}.input"].absmax == absmax


def test_dynamic_inputs_have_no_scale() -> None:
    entry = choose(variant("a8w8", dynamic=True))[f"{PREFIX}.mlp.down_proj.input"]
    assert (entry.granularity, entry.scale.size, entry.observer) == ("token", 0, "dynamic")


def test_fp8_tensor_weights_are_tied_in_fused_groups_only() -> None:
    w, table = weights(), choose(variant("a8w8_fp8"))
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        largest = max(np.abs(w[f"{n}.weight"]).max() for n in names)
        for name in names:
            entry = table[f"{PREFIX}.{name}.weight"]
            assert entry.scale == F32(largest) / F32(448)
            assert "the largest of" in entry.reason
    assert table[f"{PREFIX}.mlp.down_proj.weight"].absmax == np.abs(w["mlp.down_proj.weight"]).max()


def test_linears_left_wide_get_no_entry() -> None:
    plan = variant("a8w8")
    name = f"{PREFIX}.mlp.down_proj"
    plan.layers[name] = LayerPlan(name, "bfloat16")
    assert not [e for e in choose(plan) if e.name.startswith(name)]


def test_cache_scales_are_per_kv_head() -> None:
    seen, table = statistics(weights()), choose(variant("a8w8c8"))
    for tap in "kv":
        entry = table[f"{PREFIX}.self_attn.{tap}_cache"]
        assert np.array_equal(entry.scale, seen[tap].absmax / F32(127))
        assert entry.loss is not None
        assert entry.loss < 1e-3


@pytest.mark.parametrize(("mode", "format"), [("a8w8c8_dynamic", "int8"), ("bf16c8_fp8_dynamic", "fp8_e4m3")])
def test_a_dynamic_cache_is_decided_without_a_scale(mode: str, format: str) -> None:
    table = choose(variant(mode))
    for tap in "kv":
        entry = table[f"{PREFIX}.self_attn.{tap}_cache"]
        assert (entry.format, entry.granularity, entry.observer, entry.scale.size) == (format, "token", "dynamic", 0)
        assert entry.reason == "one scale per token and KV head, taken at run time"
    assert not lint_table(table)
    assert seed_tables(table, "llama", 2)["cachekv_scales.json"] == {}


def test_smoothing_divides_what_the_norm_puts_out() -> None:
    w, table = weights(), choose(variant("a8w8", {"smooth": {"alpha": 0.5}}))
    assert [e.name.removeprefix(PREFIX + ".") for e in table if e.kind == "transform"] == [
        "input_layernorm.smooth", "post_attention_layernorm.smooth", "mlp.up_proj.smooth",
    ]  # fmt: skip
    factors = table[f"{PREFIX}.input_layernorm.smooth"].scale
    act = statistics(w)["attn_in"].channel_absmax
    columns = np.max([np.abs(w[f"self_attn.{p}_proj.weight"]).max(axis=0) for p in "qkv"], axis=0)
    assert factors == pytest.approx(np.sqrt(act / columns), rel=2.0**-7)  # exact for a norm stored in bfloat16
    assert table[f"{PREFIX}.self_attn.q_proj.input"].absmax == pytest.approx([(act / factors).max()], rel=1e-6)


def test_smoothing_follows_grouped_heads() -> None:
    w, table = weights(), choose(variant("a8w8", ALL))
    factors = table[f"{PREFIX}.self_attn.v_proj.smooth"].scale
    assert factors.shape == (CONFIG.num_kv_heads * CONFIG.head_dim,)
    act = statistics(w)["o_in"].channel_absmax.reshape(2, 2, 16).max(axis=1).ravel()
    columns = np.abs(w["self_attn.o_proj.weight"]).max(axis=0).reshape(2, 2, 16).max(axis=1).ravel()
    assert factors == pytest.approx(np.sqrt(act / columns), rel=1e-5)


def test_smoothing_really_lowers_the_error_of_the_block() -> None:
    """Fake-quantize inputs and weights of both, run the block, compare with float."""
    w, x = weights(), hidden(9)
    wanted = forward(x, w)[0]

    def served(plan: VariantPlan) -> float:
        table = choose_block(LAYER, w, statistics(w), plan, CONFIG)
        folded = fold_block(LAYER, w, table, CONFIG)
        taps = forward(x, folded)[1]
        error = 0.0
        for line in LINEARS:
            weight, entry = folded[f"{line.name}.weight"], table[f"{PREFIX}.{line.name}.weight"]
            a = table[f"{PREFIX}.{line.name}.input"].scale[0]
            rounded = (
                np.clip(np.rint(taps[line.tap] / a), -127, 127) * a @ (np.rint(weight / entry.scale) * entry.scale).T
            )
            exact = taps[line.tap] @ weight.T
            error += float(np.square(rounded - exact).sum() / np.square(exact).sum())
        return error

    assert np.isfinite(wanted).all()
    assert served(variant("a8w8", ALL)) < 0.5 * served(variant("a8w8"))


def test_smoothing_leaves_weight_only_linears_alone() -> None:
    assert not [e for e in choose(variant("weight_only_int8", ALL)) if e.kind == "transform"]


def test_smoothing_with_another_observer_looks_again_once() -> None:
    calls: list[set[str]] = []

    def look(factors: dict[str, np.ndarray], shifts: dict[str, np.ndarray]) -> dict[str, Statistics]:
        calls.append(set(factors))
        return again(factors)

    plan = variant("a8w8c8", ALL, observer="mse")
    table = choose(plan, reobserve=look)
    assert calls == [{"attn_in", "o_in", "mlp_in", "down_in", "v"}]
    entry = table[f"{PREFIX}.mlp.down_proj.input"]
    factors = np.float32(1) / table[f"{PREFIX}.mlp.up_proj.smooth"].scale
    assert entry.absmax == range_of(again({"down_in": factors})["down_in"], "mse", 127)
    assert entry.loss is not None


def test_absmax_and_dynamic_do_not_look_again() -> None:
    def never(factors: dict[str, np.ndarray], shifts: dict[str, np.ndarray]) -> dict[str, Statistics]:
        pytest.fail(f"looked again at {sorted(factors)}")

    choose(variant("a8w8c8", ALL), reobserve=never)
    choose(variant("a8w8", ALL, observer="mse", dynamic=True), reobserve=never)
    choose(variant("a8w8", observer="mse"), reobserve=never)


def test_looking_again_must_be_possible() -> None:
    with pytest.raises(CalibrationError, match="attn_in, down_in, mlp_in must be observed again behind the transforms"):
        choose(variant("a8w8", {"smooth": {}}, observer="kl"))


def test_unknown_words_of_transforms_are_listed() -> None:
    with pytest.raises(RecipeError, match=r"unknown transform 'smoth'\. Did you mean smooth\?"):
        choose(variant("a8w8", {"smoth": {}}))
    with pytest.raises(RecipeError) as error:
        choose(variant("a8w8", {"smooth": {"targets": ["qkv"], "alhpa": 1}}))
    assert [p.split(".")[0] for p in error.value.problems] == [
        "unknown smooth target 'qkv'",
        "unknown smooth option 'alhpa'",
    ]


def test_absent_statistics_are_named() -> None:
    w = weights()
    seen = statistics(w)
    del seen["down_in"]
    with pytest.raises(CalibrationError, match=r"model.layers.2: no statistics of tap 'down_in' \(attn_in, "):
        choose_block(LAYER, w, seen, variant("a8w8"), CONFIG)


def test_nan_in_a_weight_is_named() -> None:
    w = weights()
    seen = statistics(w)
    w["mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(CalibrationError, match=r"model.layers.2.mlp.up_proj.weight: 1 of 6144 values are NaN"):
        choose_block(LAYER, w, seen, variant("a8w8"), CONFIG)


def head(**fields: object) -> VariantPlan:
    plan = variant("a8w8")
    plan.layers["lm_head"] = LayerPlan("lm_head", "int8", "channel", **fields)  # type: ignore[arg-type]
    return plan


def test_the_head_is_decided_only_where_its_plan_says_so() -> None:
    w, seen = np.ones((32, 64), F32), observe(np.ones((4, 64), F32))
    assert not choose_head(w, variant("a8w8")).entries
    assert list(choose_head(w, head()).entries) == ["lm_head.weight"]
    assert choose_head(w, head(activations="int8", dynamic=True))["lm_head.input"].granularity == "token"
    assert choose_head(w, head(activations="int8"), seen)["lm_head.input"].absmax == 1
    with pytest.raises(CalibrationError, match="lm_head: a static input scale needs statistics of its input"):
        choose_head(w, head(activations="int8"))


def rows(taps: Collection[str]) -> dict[str, np.ndarray]:
    return {tap: forward(hidden(1), weights())[1][tap].astype(F32) for tap in taps}


SEARCH = {"smooth": {"alpha": "search", "targets": list(SMOOTH_TARGETS)}}


def test_a_searched_alpha_is_told_and_beats_the_fixed_one() -> None:
    table = choose(variant("a8w8", SEARCH), sample=rows)
    entries = [e for e in table if e.kind == "transform"]
    assert len(entries) == len(SMOOTH_TARGETS)
    assert "searched: relative output error of q_proj, k_proj, v_proj" in entries[0].reason
    w, x = weights(), hidden(1)

    def error(t: ScaleTable) -> float:
        folded = fold_block(LAYER, w, t, CONFIG)
        tap = forward(x, folded)[1]["down_in"]
        a, entry = t[f"{PREFIX}.mlp.down_proj.input"].scale[0], t[f"{PREFIX}.mlp.down_proj.weight"]
        weight = folded["mlp.down_proj.weight"]
        y = tap @ weight.T
        served = np.clip(np.rint(tap / a), -127, 127) * a @ (np.rint(weight / entry.scale) * entry.scale).T
        return float(np.mean(np.square(served - y).sum(axis=1) / np.square(y).sum(axis=1)))

    assert error(table) <= error(choose(variant("a8w8", ALL)))
    assert error(table) < 0.5 * error(choose(variant("a8w8")))


def test_a_search_sees_what_earlier_targets_have_changed() -> None:
    """Smoothing o_in after attn_in: the rows are those of the folded block."""
    both = choose(variant("a8w8", {"smooth": {"targets": ["mlp_in"]}}, SEARCH_DOWN), sample=rows)
    w = fold_block(LAYER, weights(), ScaleTable({e.name: e for e in both if "layernorm" in e.name}), CONFIG)
    assert both[f"{PREFIX}.mlp.up_proj.smooth"].absmax == pytest.approx(
        np.max([np.abs(forward(hidden(s), w)[1]["down_in"]).max(axis=0) for s in (1, 2)], axis=0), rel=1e-4
    )


SEARCH_DOWN = {"smooth": {"alpha": "search", "targets": ["down_in"]}}


def test_a_search_needs_rows() -> None:
    with pytest.raises(
        CalibrationError, match=r"a search tries its candidates on rows of attn_in, and there is no model"
    ):
        choose(variant("a8w8", SEARCH))


def test_pieces_are_told_and_leave_the_float_block_unchanged() -> None:
    plan = variant("a8w8", {"piecewise": {"pieces": 2, "targets": list(SMOOTH_TARGETS)}})
    table = choose(plan, sample=rows)
    entries = [e for e in table if e.kind == "transform"]
    assert len(entries) == len(SMOOTH_TARGETS)
    assert all("channels: " in e.reason and "relative output error of" in e.reason for e in entries)
    w = weights()
    plain, folded = forward(hidden(5), w)[0], forward(hidden(5), fold_block(LAYER, w, table, CONFIG))[0]
    assert np.abs(folded - plain).max() <= 1e-4 * np.abs(plain).max()
    with pytest.raises(RecipeError, match="unknown piecewise option 'k_piece'"):
        choose(variant("a8w8", {"piecewise": {"k_piece": 3}}), sample=rows)
