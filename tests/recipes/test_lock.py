"""A lock holds every default, says what it was run with, and gives the same recipe again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantbench.errors import RecipeError
from quantbench.recipes.load import load_recipe
from quantbench.recipes.lock import Lock, load_lock, verify_lock, write_lock
from quantbench.recipes.seal import Seal
from quantbench.recipes.source import Dumper
from quantbench.vocabulary import MODES

SEAL = Seal("m" * 64, {"demo:wikipedia": "d" * 64}, {"numpy": "2.3.0"})


def lock(text: str, folder: Path) -> Path:
    return write_lock(
        load_recipe(text), folder / "recipe.lock.yaml", SEAL.model_sha256, SEAL.data_sha256, SEAL.versions
    )


def words(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


_OBSERVERS = st.sampled_from(["absmax", "avg", "mse", "percentile", "paddleslim:hist", {"percentile": 99.5}])
_WEIGHTS = words(group_size=st.sampled_from([32, 64, 128]), observer=st.sampled_from(["absmax", "mse"]))
_ACTIVATIONS = words(dynamic=st.booleans(), observer=_OBSERVERS)
_TRANSFORMS = st.sampled_from(
    [
        [],
        ["smooth"],
        [{"smooth": {"alpha": 0.25}}],
        [{"smooth": {"targets": ["attn_in"]}}, {"smooth": {"targets": ["mlp_in"], "alpha": "search"}}],
        ["piecewise"],
        ["rotate", {"awq": {"steps": 10}}, {"clip": {"hessian": "diagonal"}}],
    ]
)
_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,9}", fullmatch=True).filter(lambda n: n.lower() not in MODES)
_VARIANTS = st.fixed_dictionaries(
    {"name": _NAMES, "mode": st.sampled_from(["a8w8", "a8w8c8", "a8w8_fp8c8"])},
    optional={"weights": _WEIGHTS, "activations": _ACTIVATIONS, "transforms": _TRANSFORMS},
)
_RULES = st.fixed_dictionaries(
    {"match": st.text(min_size=1), "mode": st.sampled_from(["float", "a8w8"])}, optional={"activations": _ACTIVATIONS}
)
_RECIPES = st.fixed_dictionaries(
    {"model": st.text(min_size=1)},
    optional={
        "modes": st.lists(st.sampled_from(sorted(MODES)) | _VARIANTS, min_size=1, max_size=4, unique_by=lambda m: (
            m if isinstance(m, str) else m["name"].lower()
        )).map(lambda modes: [*modes, {"name": "some-use-for-a-transform", "mode": "a8w8c8"}]),
        "calibration": words(
            data=st.text(), samples=st.integers(1, 10**9), packing=st.booleans(), chat_template=st.just("on"),
            spill_above=st.sampled_from(["3GiB", 0, "1.5MiB"]),
        ),
        "weights": _WEIGHTS,
        "activations": _ACTIVATIONS,
        "cache_kv": words(observer=_OBSERVERS),
        "transforms": _TRANSFORMS,
        "rules": st.lists(_RULES, max_size=3),
        "accuracy": words(
            divergence=st.sampled_from(["off", {}, {"tokens": 7}]),
            perplexity=st.lists(words(data=st.text()), max_size=2),
            choices=st.lists(st.sampled_from([{"data": "c.jsonl"}, {"data": "off", "limit": 3}]), max_size=2),
        ),
        "throughput": st.just("off")
        | words(batches=st.lists(st.integers(1), min_size=1), threads=st.sampled_from(["auto", 2])),
        "parity": st.sampled_from(["off", {"tokens": 9}]),
        "gates": words(checkpoint_ratio=st.floats(0, 1e9) | st.sampled_from(["5%", 1e-7])),
        "output": st.text(min_size=1),
    },
)  # fmt: skip


@given(_RECIPES)
def test_a_recipe_comes_back_from_its_lock(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("lock")
    recipe = load_recipe(yaml.dump(tree, Dumper=Dumper))  # safe_dump leaves "0E0" bare, which is a number in YAML 1.2
    path = write_lock(recipe, folder / "recipe.lock.yaml", SEAL.model_sha256, SEAL.data_sha256, SEAL.versions)
    locked = load_lock(path)
    assert locked == Lock(recipe, SEAL)
    assert verify_lock(locked, Lock(recipe, SEAL)) == []
    again = folder / "again.yaml"
    write_lock(locked.recipe, again, SEAL.model_sha256, SEAL.data_sha256, SEAL.versions)
    assert again.read_bytes() == path.read_bytes()


def test_every_default_is_written(tmp_path: Path) -> None:
    written = yaml.safe_load(lock("model: m\n", tmp_path).read_text())
    assert written["calibration"]["samples"] == 64
    assert written["modes"] == [{"name": "a8w8", "mode": "a8w8"}]
    assert written["throughput"]["threads"] == "auto"
    assert written["output"] == "runs/recipe"
    assert written["lock"]["versions"] == {"numpy": "2.3.0"}
    assert not (tmp_path / "recipe.lock.yaml.part").exists()


def test_an_edited_lock_is_refused_until_it_is_made_a_recipe(tmp_path: Path) -> None:
    path = lock("model: m\n", tmp_path)
    path.write_text(path.read_text().replace("samples: 64", "samples: 65"))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.startswith("lock:"))
    with pytest.raises(RecipeError, match=rf"lock\.yaml:{line}: lock: the recipe was edited after it was locked\. Rem"):
        load_lock(path)
    path.write_text(path.read_text().partition("lock:")[0])
    assert load_recipe(path).calibration.samples == 65


def test_what_is_no_lock_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.lock.yaml"
    path.write_text("model: m\n")
    with pytest.raises(RecipeError, match=r"has no `lock:` section; a run writes one to its recipe\.lock\.yaml"):
        load_lock(path)
    path.write_text("model: m\nlock: {model_sha256: 3}\n")
    with pytest.raises(RecipeError, match=r"yaml:2: lock: not a lock of quantbench, which holds recipe_sha256, model_"):
        load_lock(path)


def test_each_difference_is_told(tmp_path: Path) -> None:
    locked = load_lock(lock("model: m\n", tmp_path))
    other = load_recipe("model: m\nweights: {observer: mse}\n")
    seal = Seal("x", {"demo:wikipedia": "y", "more": "z"}, {"numpy": "2.3.1", "paddlepaddle": "3.3.1"})
    words, model, data, more, numpy, paddle = verify_lock(locked, Lock(other, seal))
    assert words.startswith("weights was {'granularity': 'auto',")
    assert model == f"sha256 of the model was {'m' * 64}, is x"
    assert data == f"sha256 of the tokens of demo:wikipedia was {'d' * 64}, is y"
    assert more == "sha256 of the tokens of more was absent, is z"
    assert numpy == "version of numpy was 2.3.0, is 2.3.1"
    assert paddle == "version of paddlepaddle was absent, is 3.3.1"


def test_running_a_lock_on_another_model_is_refused(tmp_path: Path) -> None:
    path = lock("model: m\n", tmp_path)
    recipe, again = load_recipe(path), tmp_path / "again.yaml"
    with pytest.raises(RecipeError, match=r"lock\.yaml: sha256 of the model was m+, is x") as caught:
        write_lock(recipe, again, "x", SEAL.data_sha256, SEAL.versions)
    assert caught.value.problems[-1].endswith("bring back what it was locked with, or remove its `lock:` section")
    assert not again.exists()
    newer = replace(SEAL, versions={"numpy": "2.3.9"})
    write_lock(recipe, again, newer.model_sha256, newer.data_sha256, newer.versions)
    assert load_lock(again).seal == newer
