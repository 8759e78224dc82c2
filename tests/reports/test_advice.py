"""Every rule at its threshold, on both sides, and never a rule without a sentence and something to try."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.reports import advice
from quantbench.reports.layers import LayerFacts, _typical
from quantbench.reports.stages import StageFacts

CLEAN = LayerFacts(
    name="model.layers.11.mlp.down_proj",
    block=11,
    tap="down_in",
    weights="int8",
    weight_sqnr_db=43.0,
    activations="int8",
    dynamic=False,
    input_sqnr_db=40.0,
    input_absmax=20.0,
    input_p999=9.1,
    over_channels=3.0,
    over_layers=1.0,
    levels=58.0,
    typical_sqnr_db=46.0,
    rule="default",
    method="rtn",
)
BAD = replace(CLEAN, input_absmax=3537.0, levels=127 * 9.1 / 3537, typical_sqnr_db=1.1)


def rules(layer: LayerFacts) -> list[tuple[str, str]]:
    return [(f.rule, f.severity) for f in advice.layer_findings("a8w8", [layer])]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"levels": 12.0}, []),
        ({"levels": 11.9}, [("outlier_input", "warn")]),
        ({"levels": 4.0}, [("outlier_input", "warn")]),
        ({"levels": 3.9}, [("outlier_input", "bad")]),
        ({"levels": None, "dynamic": True}, []),
        ({"weight_sqnr_db": 30.0}, []),
        ({"weight_sqnr_db": 29.9}, [("noisy_weight", "warn")]),
        ({"weights": "int4", "weight_sqnr_db": 15.0}, []),
        ({"weights": "int4", "weight_sqnr_db": 14.9}, [("noisy_weight", "warn")]),
        ({"weights": "fp8_e4m3", "weight_sqnr_db": 24.9}, [("noisy_weight", "warn")]),
        ({"weights": "float32", "weight_sqnr_db": 1.0}, []),
        ({"input_sqnr_db": 20.0}, []),
        ({"input_sqnr_db": 19.9}, [("noisy_input", "warn")]),
        ({"input_sqnr_db": 19.9, "levels": 2.0}, [("outlier_input", "bad")]),
        ({"input_absmax": 0.0, "input_p999": 0.0}, [("silent_input", "warn")]),
        ({"activations": "fp8_e4m3", "levels": None, "input_absmax": 448.0, "input_p999": 2**-6 * 1.001}, []),
        ({"activations": "fp8_e4m3", "levels": None, "input_absmax": 448.0, "input_p999": 2**-6 * 0.999},
         [("fp8_underflow", "warn")]),
        ({"activations": "fp8_e4m3", "levels": None, "dynamic": True, "input_absmax": 448.0, "input_p999": 1e-6}, []),
    ],
)  # fmt: skip
def test_thresholds(change: dict[str, Any], found: list[tuple[str, str]]) -> None:
    assert rules(replace(CLEAN, **change)) == found


def test_the_sentence_of_an_outlier() -> None:
    (finding,) = advice.layer_findings("a8w8", [BAD])
    assert finding.what == (
        "input of model.layers.11.mlp.down_proj reaches 3,537 while 99.9% of its values are below 9.1: "
        "they share 0.33 of 127 steps"
    )
    assert finding.advice == (
        "smooth it: transforms: [{smooth: {alpha: 0.9}}]",
        'scales per token: rules: [{match: "model.layers.11.mlp.down_proj", variants: [a8w8], '
        "activations: {dynamic: true}}]",
        'or leave it float: rules: [{match: "model.layers.11.mlp.down_proj", variants: [a8w8], mode: float}]',
    )


def test_advice_on_outliers_is_a_recipe(sample: object) -> None:
    """Each line after its first colon is YAML that the recipe's schema accepts."""
    import yaml

    from quantbench.recipes.schema import Recipe

    (finding,) = advice.layer_findings("a8w8", [replace(BAD, tap="mlp_in", name="model.layers.1.mlp.up_proj")])
    assert len(finding.advice) == 3
    for line in finding.advice:
        section = yaml.safe_load(line.partition(": ")[2])
        recipe = Recipe.model_validate({"model": "m", "modes": ["a8w8"]} | section)
        assert recipe.rules or recipe.transforms


@pytest.mark.parametrize(
    ("name", "tap", "glob"),
    [("model.layers.1.self_attn.k_proj", "attn_in", "model.layers.1.self_attn.[qkv]_proj"),
     ("model.layers.1.mlp.up_proj", "mlp_in", "model.layers.1.mlp.[gu]*_proj"),
     ("model.layers.1.mlp.down_proj", "down_in", "model.layers.1.mlp.down_proj"),
     ("lm_head", None, "lm_head")],
)  # fmt: skip
def test_linears_that_run_as_one_are_advised_as_one(name: str, tap: str | None, glob: str) -> None:
    from fnmatch import fnmatchcase

    assert advice.together(replace(BAD, name=name, tap=tap)) == glob
    assert fnmatchcase(name, glob)
    assert not fnmatchcase("model.layers.1.self_attn.o_proj", glob)


def stage(after: str, steps: float | None = None) -> StageFacts:
    return StageFacts(after, 40.0, 30.0, 29.0, steps, 0.0, None)


def test_smoothing_is_offered_only_where_it_can_be_folded_and_was_not_tried() -> None:
    def offers(**changes: Any) -> bool:
        (finding,) = advice.layer_findings("a8w8", [replace(BAD, **changes)])
        return any("smooth" in line for line in finding.advice)

    assert [offers(tap=tap) for tap in ("attn_in", "mlp_in", "o_in", "down_in")] == [True, True, False, True]
    assert not offers(smoothed=True)


def test_weights_are_advised_what_has_not_been_done() -> None:
    def told(**changes: Any) -> tuple[str, ...]:
        (finding,) = advice.layer_findings("a8w8", [replace(CLEAN, weight_sqnr_db=10.0, **changes)])
        return finding.advice

    channel, gptq, keep = told()
    assert channel == "weights: {granularity: channel}"
    assert told(granularity="channel") == (gptq, keep)
    assert told(granularity="channel", method="gptq") == (keep,)
    smoothed = told(granularity="channel", smoothed=True)
    assert smoothed == ("a smaller alpha, which moves less of the input into the weight", gptq, keep)


def test_an_outlier_behind_a_transform_is_told_by_its_steps() -> None:
    layer = replace(BAD, input_p999=None, levels=9.9, stages=(stage(""), stage("smooth", 3.0)))
    (finding,) = advice.layer_findings("a8w8", [layer])
    assert finding.what == (
        "input of model.layers.11.mlp.down_proj, after smooth, leaves about 9.9 of 127 steps to an ordinary channel"
    )


def test_layers_that_share_an_input_share_its_finding() -> None:
    names = [f"model.layers.11.self_attn.{x}_proj" for x in "qkv"]
    layers = [replace(BAD, name=name, tap="attn_in", weight_sqnr_db=10.0) for name in names]
    found = advice.layer_findings("a8w8", layers)
    assert [f.rule for f in found].count("outlier_input") == 1
    assert [f.layer for f in found if f.rule == "noisy_weight"] == names


@given(
    st.floats(1e-3, 1e5), st.floats(1, 1e6), st.booleans(), st.floats(0, 100), st.floats(0, 100),
    st.sampled_from(["int8", "int4", "fp8_e4m3"]),
)  # fmt: skip
def test_findings_are_complete_sentences(
    usual: float, factor: float, dynamic: bool, weight: float, given_db: float, form: str
) -> None:
    levels = None if dynamic else 127 / factor
    layer = replace(
        CLEAN, input_p999=usual, input_absmax=usual * factor, levels=levels, typical_sqnr_db=_typical(levels),
        dynamic=dynamic, weight_sqnr_db=weight, input_sqnr_db=given_db, weights=form,
    )  # fmt: skip
    for finding in advice.layer_findings("v", [layer]):
        assert finding.severity in advice.SEVERITIES
        assert layer.name in finding.what
        assert finding.advice
        assert "None" not in finding.what
        assert "nan" not in finding.what


def record(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "quantized": True,
        "accuracy": {"perplexity": []},
        "speed": {"decode": {}},
        "parity": None,
    }
    return base | changes


def scored(*increases: float | None) -> dict[str, Any]:
    scores = [{"data": f"d{i}", "perplexity": 30.0, "increase": x} for i, x in enumerate(increases)]
    return record(accuracy={"perplexity": scores})


@pytest.mark.parametrize(
    ("increases", "severity"),
    [((), None), ((None,), None), ((0.049,), None), ((0.05,), "warn"), ((0.01, 0.19), "warn"), ((0.2,), "bad")],
)
def test_perplexity(increases: tuple[float | None, ...], severity: str | None) -> None:
    finding = advice.accuracy_finding("v", scored(*increases), [CLEAN])
    assert (finding.severity if finding else None) == severity


def test_perplexity_names_the_worst_text_and_its_cause() -> None:
    def told(layers: list[LayerFacts]) -> tuple[str, ...]:
        finding = advice.accuracy_finding("v", scored(0.06, 1.5), layers)
        assert finding is not None
        assert finding.what == "perplexity on d1 is 30.00, +150%"
        return finding.advice

    assert told([CLEAN, BAD, replace(BAD, block=3)]) == (
        "mend the 2 inputs with outliers, or all at once: transforms: [{smooth: {alpha: 0.9}}]",
        "or scales per token: activations: {dynamic: true}",
    )
    groups = "weights: {granularity: group, group_size: 32, symmetric: false}"
    assert told([replace(CLEAN, weights="int4")])[:2] == ("method: {gptq: {act_order: true}}", groups)
    assert told([replace(CLEAN, weights="int4", method="gptq")])[0] == groups
    assert told([CLEAN]) == ("keep the layers with the lowest SQNR in float by rule: mode: float",)


def test_the_worst_layer_comes_first() -> None:
    layers = [
        replace(BAD, block=i, name=f"model.layers.{i}.mlp.down_proj", typical_sqnr_db=db)
        for i, db in ((1, 9.0), (2, 3.0))
    ]
    assert [f.layer for f in advice.layer_findings("v", layers)] == [
        "model.layers.2.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip


BREAKS = "differ on identical inputs: the kernel breaks the specification"
PARITY = {
    "codes_compared": 1000, "codes_different": 0, "scales_different": 0, "first_departure": None,
    "top1_served_simulated": 0.998, "kl_served_simulated": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"codes_different": 2}, [("bad", f"2 of 1,000 codes and 0 scales {BREAKS}")]),
        ({"scales_different": 1}, [("bad", f"0 of 1,000 codes and 1 scales {BREAKS}")]),
        ({"first_departure": {"layer": "model.layers.3", "why": "a reason"}},
         [("warn", "served against simulated: top-1 99.8%, KL 0.000100; first departs at model.layers.3: a reason")]),
        ({"top1_served_simulated": 0.997}, [("warn", "served against simulated: top-1 99.7%, KL 0.000100")]),
        ({"kl_served_simulated": 2e-4}, [("warn", "served against simulated: top-1 99.8%, KL 0.000200")]),
        ({"top1_served_simulated": None, "kl_served_simulated": None}, []),
    ],
)  # fmt: skip
def test_parity(change: dict[str, Any], said: list[tuple[str, str]]) -> None:
    found = advice.parity_findings("v", record(parity=PARITY | change))
    assert [(f.severity, f.what) for f in found] == said
    assert all(f.advice for f in found)
    assert advice.parity_findings("v", record()) == []


def test_slower_than_the_baseline() -> None:
    decode = {"1": {"speedup": 0.9, "why": "attention dominates"}, "8": {"speedup": 1.0, "why": None}}
    (finding,) = advice.slow_findings("v", record(speed={"decode": decode}))
    assert (finding.what, finding.advice) == (
        "decode at batch 1 runs at 0.900x of the baseline", ("attention dominates",),
    )  # fmt: skip
    assert advice.slow_findings("v", record(speed={"decode": decode}, quantized=False)) == []


def test_the_noisiest_cache() -> None:
    assert advice.cache_finding("v", {"a": 20.0, "b": None}) is None
    finding = advice.cache_finding("v", {"a": 19.0, "b": 12.0, "c": 30.0})
    assert finding is not None
    assert finding.what == "b keeps 12.0 dB; 20.0 dB is expected (2 caches are below)"
