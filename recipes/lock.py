"""recipe.lock.yaml: a recipe with every default filled in and what it was run with; running it gives the same bytes.

A lock is a recipe: `quantbench calibrate runs/demo/recipe.lock.yaml` runs it again, and refuses where the model or the
calibration text has changed since.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantbench.errors import RecipeError
from quantbench.recipes.load import load_recipe
from quantbench.recipes.schema import Recipe
from quantbench.recipes.seal import KEY, Seal, section_of
from quantbench.recipes.source import Dumper

_HEADER = "# Written by quantbench: the recipe of this run with every default, and what it was run with.\n"


@dataclass(frozen=True)
class Lock:
    """A recipe and what it was, or is about to be, run with."""

    recipe: Recipe
    seal: Seal


def write_lock(
    recipe: Recipe, path: Path, model_sha256: str, data_sha256: Mapping[str, str], versions: Mapping[str, str]
) -> Path:
    """Write the lock, atomically. `data_sha256` maps the name of a text in the recipe to the hash of its tokens.

    Raises RecipeError where the recipe was itself read from a lock, and the model or the text is not what that names.
    """
    seal = Seal(model_sha256, dict(data_sha256), dict(versions))
    if recipe.source.seal is not None:
        name = recipe.source.name
        changed = [f"{name}: {difference}" for difference in recipe.source.seal.changed_inputs(seal)]
        if changed:
            remedy = f"{name}: bring back what it was locked with, or remove its `lock:` section"
            raise RecipeError(*changed, remedy)
    words = _written(recipe.model_dump(mode="json"))
    text = _HEADER + yaml.dump(words | {KEY: section_of(seal, words)}, Dumper=Dumper, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def load_lock(path: Path) -> Lock:
    """Read a lock. Raises RecipeError where it is absent, is no lock, or was edited."""
    recipe = load_recipe(path)
    if recipe.source.seal is None:
        raise RecipeError(f"{path}: has no `lock:` section; a run writes one to its recipe.lock.yaml")
    return Lock(recipe, recipe.source.seal)


def verify_lock(lock: Lock, current: Lock) -> list[str]:
    """What differs between a lock and now, one line each: words of the recipe, model, texts, versions."""
    then, now = lock.recipe.model_dump(mode="json"), current.recipe.model_dump(mode="json")
    words = [f"{key} was {then[key]!r}, is {now[key]!r}" for key in then if then[key] != now[key]]
    return words + lock.seal.changed_inputs(current.seal) + lock.seal.changed_versions(current.seal)


def _written(value: Any) -> Any:
    """Without the words that are not set: a null in a variant or a rule means "as elsewhere"."""
    if isinstance(value, dict):
        return {key: _written(v) for key, v in value.items() if v is not None}
    return [_written(v) for v in value] if isinstance(value, list) else value
