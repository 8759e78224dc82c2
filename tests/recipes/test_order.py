from __future__ import annotations

from collections.abc import Callable

import pytest

from quantbench.recipes.load import load_recipe
from quantbench.recipes.order import ORDER, acts_on
from quantbench.recipes.transforms import Transform
from quantbench.vocabulary import MODES

Problems = Callable[..., tuple[str, ...]]

WRONG = {
    "transforms: [smooth, {smooth: {targets: [o_in, down_in]}}]": [
        "recipe:2: transforms[1].smooth: down_in is scaled already by transforms[0] smooth; give the two different "
        "targets, or drop one"
    ],
    "modes:\n  - {mode: a8w8, transforms: [{smooth: {targets: [o_in]}}, piecewise, smooth]}": [
        "recipe:3: modes[0].transforms[2].smooth: attn_in, mlp_in, down_in are scaled already by modes.0.transforms[1] "
        "piecewise; give the two different targets, or drop one"
    ],
    "transforms: [awq, piecewise]": [
        "recipe:2: transforms[1].piecewise: attn_in, mlp_in, down_in are scaled already by transforms[0] awq; give the "
        "two different targets, or drop one"
    ],
    "transforms: [smooth, rotate]": [
        "recipe:2: transforms[1].rotate: rotate belongs before transforms[0] smooth: it changes the model that every "
        "other word sees. Move it there"
    ],
    "transforms:\n  - clip\n  - smooth\n  - awq: {targets: [o_in]}": [
        "recipe:4: transforms[1].smooth: smooth belongs before transforms[0] clip: its factors change the weights and "
        "ranges that later words decide on. Move it there",
        "recipe:5: transforms[2].awq: awq belongs before transforms[0] clip: its factors",
    ],
    "transforms: [smooth, shift]": [
        "recipe:2: transforms[1].shift: shift belongs before transforms[0] smooth: it moves the ranges that later words"
    ],
    "transforms: [bias_correction, clip]": [
        "recipe:2: transforms[1].clip: clip belongs before transforms[0] bias_correction: it decides the ranges"
    ],
    "transforms: [clip, clip]": [
        "recipe:2: transforms[1].clip: attn_in, o_in, mlp_in, down_in are clipped already by transforms[0] clip; give"
    ],
    "transforms: [rotate, {rotate: {seed: 1}}]": [
        "recipe:2: transforms[1].rotate: the model is rotated already by transforms[0] rotate; drop one"
    ],
    "modes: [weight_only_int4, weight_only_int8c8]\ntransforms: [smooth]": [
        "recipe:3: transforms[0].smooth: smooth does nothing here: no mode of weight_only_int4, weight_only_int8c8 "
        "quantizes the inputs of linears. Drop it"
    ],
    "modes: [a8w8, bf16]\ntransforms: [kv_smooth]": [
        "recipe:3: transforms[0].kv_smooth: kv_smooth does nothing here: no mode of a8w8 quantizes the KV cache"
    ],
    "modes: [a8w8c8]\ntransforms: [kv_smooth, smooth, kv_smooth]": [
        "recipe:3: transforms[2].kv_smooth: the keys are smoothed already by transforms[0] kv_smooth; drop one"
    ],
    "modes:\n  - {mode: weight_only_int4, transforms: [piecewise]}\n  - a8w8": [
        "recipe:3: modes[0].transforms[0].piecewise: piecewise does nothing here: no mode of weight_only_int4 quantizes"
    ],
}


@pytest.mark.parametrize("text", WRONG, ids=lambda t: t[:60])
def test_what_makes_no_sense_is_told_with_its_place(text: str, problems_of: Problems) -> None:
    found = problems_of(text)
    assert len(found) == len(WRONG[text])
    for line, expected in zip(found, WRONG[text], strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "transforms: [rotate, shift, smooth, clip, bias_correction]\nmethod: gptq",
        "transforms: [{smooth: {targets: [down_in]}}, {awq: {targets: [attn_in, mlp_in]}}, clip]",
        "transforms: [{awq: {targets: [attn_in]}}, {smooth: {targets: [down_in]}}]",
        "transforms: [{clip: {targets: [attn_in]}}, {clip: {targets: [mlp_in], hessian: diagonal}}]",
        "modes: [a8w8, weight_only_int4, fp32]\ntransforms: [smooth]",
        "modes: [weight_only_int4]\ntransforms: [smooth]\nrules: [{match: '*.down_proj', mode: a8w8}]",
        "modes: [bf16]\ntransforms: [smooth]",
        "modes: [bf16c8, a8w8]\ntransforms: [kv_smooth, smooth]",
    ],
)
def test_what_makes_sense_is_not_refused(text: str) -> None:
    load_recipe(f"model: m\n{text}\n")


def test_every_transform_has_a_place() -> None:
    assert set(ORDER) == set(Transform.model_fields)


def test_a_float_variant_keeps_what_is_for_its_cache() -> None:
    assert acts_on("kv_smooth", MODES["bf16c8"])
    assert not acts_on("kv_smooth", MODES["bf16"])
    assert not acts_on("smooth", MODES["bf16c8"])
    assert acts_on("smooth", MODES["a8w8"])
