"""`--set`: what it writes, and each of its mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quantbench.recipes.load import load_recipe

Problems = Callable[..., tuple[str, ...]]


def test_values_are_yaml_and_later_ones_win() -> None:
    text = "model: m\nmodes: [a8w8, {name: b, mode: a8w8}]\nrules: [{match: x, mode: float}]\nthroughput: off\n"
    options = ["weights.group_size=32", "weights.group_size=128", "modes[1].name=c", "rules.0.mode=bf16"]
    recipe = load_recipe(text, [*options, "throughput.batches=[2]", "gates.a8w8.kl=5%", "model=a=b"])
    assert recipe.weights.group_size == 128
    assert [v.name for v in recipe.modes] == ["a8w8", "c"]
    assert recipe.rules[0].mode == "bf16"
    assert recipe.throughput is not None
    assert recipe.throughput.batches == (2,)
    assert recipe.gate_limits()["a8w8"] == {"kl": 0.05}
    assert recipe.model == "a=b"


def test_a_whole_section_can_be_set() -> None:
    recipe = load_recipe("model: m\nweights: {observer: mse}\n", ["weights={granularity: tensor}", "parity=off"])
    assert recipe.weights.model_dump() == load_recipe("model: m\nweights: {granularity: tensor}\n").weights.model_dump()
    assert recipe.parity is None


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (
            "weights.grnularity=x",
            "--set weights.grnularity=x: weights.grnularity: unknown key 'grnularity'. Did you mean",
        ),
        ("wieghts.observer=mse", "--set wieghts.observer=mse: wieghts: unknown key 'wieghts'. Did you mean weights?"),
        ("weights.observer=x", "--set weights.observer=x: weights.observer: unknown weight observer 'x'."),
        ("weights", "--set weights: not of the form key=value; write --set weights.group_size=32 or --set modes='"),
        ("=3", "--set =3: not of the form key=value; write --set"),
        ("weights..observer=mse", "--set weights..observer=mse: not of the form key=value; write --set"),
        ("modes=[a", "--set modes=[a: not valid YAML: "),
        ("modes.0.name=x", "--set modes.0.name=x: modes.0 is a plain word, not a mapping; set it as a whole"),
        ("modes.7=a8w8", "--set modes.7=a8w8: modes has 1 items, counted from 0"),
        ("modes.x=a8w8", "--set modes.x=a8w8: modes is a list, so a number must follow; write --set"),
        ("weights.0=x", "--set weights.0=x: weights is not a list; write --set"),
        ("0=x", "--set 0=x: a recipe has no key 0; write --set"),
        ("gates.a8w9.kl=1", "--set gates.a8w9.kl=1: gates.a8w9: unknown gate or variant 'a8w9'. Did you mean a8w8?"),
        (f"output=[{'x' * 80}]", "--set output=…: output: expected text, got a list"),
    ],
)
def test_each_mistake_names_the_option(option: str, problem: str, problems_of: Problems) -> None:
    (found,) = problems_of("modes: [a8w8]", option)
    assert found.startswith(problem)


def test_an_override_repairs_the_word_it_replaces() -> None:
    assert load_recipe("model: m\nweights: {observer: wrong}\n", ["weights={}"]).weights.observer == "absmax"
