"""What search chooses among on a tiny run, what it refuses, and that the recipe keeps its promise."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml

from quantbench.calibrate.budget import Selection, choose, front
from quantbench.cli.search import budget_of, listed, require_one, thinned
from quantbench.errors import QuantbenchError, RecipeError, RequestError
from quantbench.losses import FILE, Measurement, estimated_losses, measured_losses
from quantbench.mixture import Mixture, mixed_recipe, mixed_rules, open_mixture, open_run, quantized_variants
from quantbench.pipeline import Options, load
from quantbench.reports.progress import PlainProgress
from quantbench.vocabulary import LayerPlan

WEIGHT_ONLY = ["weight_only_int4", "weight_only_int8", "bf16"]
SHORT = Measurement(tokens=64)


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run in a folder of its own, to leave sensitivity.json in: elsewhere than its recipe says."""
    folder = tmp_path_factory.mktemp("search") / "run"
    shutil.copytree(tiny_run, folder)
    return folder


@pytest.fixture(scope="module")
def mixture(run: Path) -> Mixture:
    return open_mixture(run, WEIGHT_ONLY)


@pytest.fixture(scope="module")
def losses(run: Path, mixture: Mixture, quiet: PlainProgress) -> dict[str, dict[str, float]]:
    return measured_losses(run, mixture.run, quantized_variants(mixture.run, WEIGHT_ONLY), SHORT, quiet)


@pytest.fixture(scope="module")
def quiet() -> PlainProgress:
    return PlainProgress(io.StringIO())


def planned(text: str, folder: Path) -> tuple[int, dict[str, LayerPlan]]:
    """Bytes and plan of a written recipe, as `quantbench calibrate` would plan it."""
    path = folder / "mixed.yaml"
    path.write_text(text)
    plan = load(str(path), Options()).plan
    return plan.forecast.checkpoint_bytes["mixed"], plan.variants["mixed"].layers


def assert_planned(mixture: Mixture, layers: dict[str, LayerPlan], labels: dict[str, str]) -> None:
    """Every linear is planned as its candidate has it, whatever rule says so."""
    for group in mixture.groups:
        for name in group.linears:
            wanted = mixture.plan(labels[group.name], name)
            assert vars(layers[name]) | {"rule": ""} == vars(wanted) | {"rule": ""}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 0.77, 1.0])
def test_the_written_recipe_plans_what_was_promised(
    mixture: Mixture, losses: dict[str, dict[str, float]], tmp_path: Path, share: float
) -> None:
    options = mixture.options(losses)
    smallest, largest = front(options)[0].cost, front(options)[-1].cost
    budget = int(smallest + share * (largest - smallest))
    chosen = choose(options, budget)
    size, layers = planned(mixed_recipe(mixture, chosen, "why"), tmp_path)
    assert size == chosen.cost + mixture.fixed_bytes == mixture.bytes_with(chosen)
    assert size <= budget + mixture.fixed_bytes
    assert_planned(mixture, layers, chosen.labels)


def test_the_recipe_is_plain_and_says_where_it_comes_from(
    mixture: Mixture, losses: dict[str, dict[str, float]]
) -> None:
    options = mixture.options(losses)
    text = mixed_recipe(mixture, choose(options, front(options)[4].cost), "first line\nsecond line")
    assert text.startswith("# first line\n# second line\nmodel: ")
    words = yaml.safe_load(text)
    assert [m["name"] for m in words["modes"]] == ["mixed"]
    assert not {"lock", "gates", "output"} & set(words)
    assert words["rules"][-1]["match"] == "model.layers.*"
    assert len({r["match"] for r in words["rules"]}) == len(words["rules"])


def test_blocks_of_one_kind_share_a_rule(mixture: Mixture) -> None:
    labels = {g.name: "weight_only_int8" for g in mixture.groups}
    labels |= {f"model.layers.{i}.qkv": "weight_only_int4" for i in range(3)}
    labels |= {f"model.layers.{i}.down": "bf16" for i in (0, 2)} | {"model.layers.1.gate_up": "bf16"}
    rules = mixed_rules(mixture, Selection(0, 0.0, labels))
    assert [(r["match"], r["mode"]) for r in rules] == [
        ("model.layers.*.self_attn.[qkv]_proj", "weight_only_int4"),
        ("model.layers.[02].mlp.down_proj", "float"),
        ("model.layers.1.mlp.[gu]*_proj", "float"),
        ("model.layers.*", "weight_only_int8"),
    ]


def test_settings_of_a_variant_travel_into_its_rules(run: Path, tmp_path: Path) -> None:
    """A variant with inputs of its own beside one without: rules repeat what the variant wrote."""
    mixture = open_mixture(run, ["a8w8-dynamic", "weight_only_int8", "a8w8"])
    names = ["weight_only_int8", "a8w8-dynamic", "a8w8"]
    labels = {g.name: names[(i + i // 4) % 3] for i, g in enumerate(mixture.groups)} | {"lm_head": "a8w8"}
    text = mixed_recipe(mixture, Selection(0, 0.0, labels), "why")
    assert text.count("dynamic: true") > 1
    assert "&id" not in text  # plain words, no YAML aliases
    layers = planned(text, tmp_path)[1]
    assert_planned(mixture, layers, labels)


def test_a_method_with_settings_travels_too(run: Path, tmp_path: Path) -> None:
    gptq = {"name": "gptq", "mode": "weight_only_int4", "method": {"gptq": {"act_order": False}}}
    changes = {"modes": [gptq, "weight_only_int8"], "gates": {}, "transforms": []}
    folder = edited(run, tmp_path / "run", changes)
    mixture = open_mixture(folder)
    labels = {g.name: list(mixture.variants)[i % 2] for i, g in enumerate(mixture.groups)}
    layers = planned(mixed_recipe(mixture, Selection(0, 0.0, labels), "why"), tmp_path)[1]
    assert_planned(mixture, layers, labels)
    assert {plan.method for plan in layers.values()} == {"gptq", "rtn"}


def test_sizes_of_uniform_choices_are_those_of_the_run(mixture: Mixture) -> None:
    sizes = mixture.run.plan.forecast.checkpoint_bytes
    for name in WEIGHT_ONLY:
        assert mixture.fixed_bytes + sum(mixture.bytes_of(name, g) for g in mixture.groups) == sizes[name]
    assert mixture.whole_bytes == sizes["bf16"]
    assert mixture.shapes["lm_head"] == (512, 64)


def test_what_was_measured_is_kept_until_tokens_or_checkpoint_change(
    run: Path, mixture: Mixture, losses: dict[str, dict[str, float]], quiet: PlainProgress
) -> None:
    kept = json.loads((run / FILE).read_text())
    assert set(kept["variants"]) == {"weight_only_int4", "weight_only_int8"}
    kept["variants"]["weight_only_int4"]["kl"]["model.layers.0.qkv"] = 77.0
    kept["variants"]["weight_only_int8"]["checkpoint_sha256"] = "another"
    (run / FILE).write_text(json.dumps(kept))
    again = measured_losses(run, mixture.run, losses, SHORT, quiet)
    assert again["weight_only_int4"]["model.layers.0.qkv"] == 77.0
    assert again["weight_only_int8"] == losses["weight_only_int8"]
    longer = measured_losses(run, mixture.run, ["weight_only_int4"], Measurement(tokens=65), quiet)
    assert longer["weight_only_int4"]["model.layers.0.qkv"] < 1
    (run / FILE).unlink()


def test_estimates_cover_the_groups_that_measuring_covers(
    run: Path, mixture: Mixture, losses: dict[str, dict[str, float]], quiet: PlainProgress
) -> None:
    found = estimated_losses(run, mixture.run, losses, quiet)
    assert {name: set(of) for name, of in found.items()} == {name: set(of) for name, of in losses.items()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["weight_only_int9"], "unknown variant 'weight_only_int9'. Did you mean weight_only_int8?"),
        (["bf16"], "no quantized linears in bf16: nothing to rank"),
        (["a8w8", "a8w8c8"], "a8w8c8: its KV cache is quantized, which is not chosen per layer"),
        (["a8w8"], "nothing to choose among: a8w8. Name two variants of the run or more with --modes"),
    ],
)
def test_variants_that_cannot_be_mixed_are_refused(run: Path, names: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        open_mixture(run, names)
    assert any(message in p for p in raised.value.problems)


def edited(run: Path, folder: Path, changes: dict[str, object]) -> Path:
    """A run folder with only a lock, whose words are changed."""
    words = yaml.safe_load((run / "recipe.lock.yaml").read_text()) | changes
    del words["lock"]
    folder.mkdir()
    (folder / "recipe.lock.yaml").write_text(yaml.safe_dump(words))
    return folder


def test_transforms_and_float_dtypes_that_differ_are_refused_together(run: Path, tmp_path: Path) -> None:
    modes = ["bf16", "fp16", "a8w8_fp8", {"mode": "a8w8", "transforms": []}]
    folder = edited(run, tmp_path / "run", {"modes": modes, "gates": {}})
    with pytest.raises(RecipeError) as raised:
        open_mixture(folder, ["bf16", "fp16", "a8w8_fp8", "a8w8"])
    assert raised.value.problems == (
        "bf16, fp16, a8w8_fp8, a8w8: their transforms differ, and one checkpoint has one list. Calibrate them with one",
        "bfloat16, float16: a checkpoint has one float dtype. Name one float variant",
    )


def test_rules_of_the_run_stay_and_a_quantized_head_is_a_group(run: Path, tmp_path: Path) -> None:
    """Layers that a rule of the run decided in every variant are decided so again, whatever is chosen."""
    rules = [
        {"match": "lm_head", "mode": "weight_only_int8"},
        {"match": "*.0.mlp.down_proj", "mode": "float"},
        {"match": "*.1.*", "weights": {"observer": "mse"}},
    ]
    folder = edited(run, tmp_path / "run", {"rules": rules, "gates": {}})
    mixture = open_mixture(folder, ["weight_only_int4", "weight_only_int8"])
    labels = {g.name: ("weight_only_int4", "weight_only_int8")[i % 2] for i, g in enumerate(mixture.groups)}
    picked = Selection(sum(mixture.bytes_of(labels[g.name], g) for g in mixture.groups), 0.0, labels)
    size, layers = planned(mixed_recipe(mixture, picked, "why"), tmp_path)
    assert size == picked.cost + mixture.fixed_bytes == mixture.bytes_with(picked)
    assert layers["lm_head"].weights == "int8"
    assert layers["model.layers.0.mlp.down_proj"].weights == "bfloat16"
    assert layers["model.layers.1.mlp.up_proj"].weight_observer == "mse"


def test_budgets_are_given_once_and_make_sense(mixture: Mixture) -> None:
    assert (budget_of(mixture, 5, None), budget_of(mixture, None, 0.5)) == (5, mixture.whole_bytes // 2)
    for given in ((None, None, None), (1, 0.5, None), (None, 0.5, 100.0)):
        with pytest.raises(RequestError, match="give the budget once"):
            require_one(*given)
    require_one(None, None, 100.0)
    with pytest.raises(RequestError, match=r"--budget-ratio 1\.5: a share of the float checkpoint above 0, at most 1"):
        budget_of(mixture, None, 1.5)


def test_too_few_tokens_and_no_run_are_refused(run: Path, mixture: Mixture, quiet: PlainProgress) -> None:
    with pytest.raises(RequestError, match="--tokens 1: at least 2 tokens are needed"):
        measured_losses(run, mixture.run, WEIGHT_ONLY[:1], Measurement(tokens=1), quiet)
    with pytest.raises(QuantbenchError, match=r"checkpoint: no recipe\.lock\.yaml: give the folder of a run"):
        open_run(run / "checkpoint")


def test_lists_and_thinned_fronts() -> None:
    assert (listed(" a, b,,"), listed(None)) == (["a", "b"], [])
    points = [{"bytes": i} for i in range(40)]
    few = thinned(points)
    assert (len(few), few[0], few[-1]) == (12, points[0], points[-1])
    assert thinned(points[:1]) == points[:1]
