"""recipe.lock.yaml: a recipe with every default filled in and what it was run with; running it gives the same bytes.

A lock is a recipe: `quantbench calibrate runs/demo/recipe.lock.yaml` runs it again, and refuses where the model or the
calibration text has changed since.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from quantbench import __version__
from quantbench.errors import RecipeError
from quantbench.recipes.load import load_recipe
from quantbench.recipes.schema import Recipe
from quantbench.recipes.seal import KEY, section_of
from quantbench.recipes.source import Dumper, Seal

_HEADER = "# Written by quantbench: the recipe of this run with every default, and what it was run with.\n"
_LIBRARIES = ("paddlepaddle", "paddlepaddle-gpu", "paddleslim", "numpy", "ml_dtypes", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of everything that decides numbers; a library that is not installed is left out."""
    found = {"quantbench": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_lock(recipe: Recipe, path: Path, model_sha256: str, data_sha256: str, versions: Mapping[str, str]) -> Path:
    """Write the lock, atomically: the recipe's words, and the hashes of the model and of the calibration tokens.

    Raises RecipeError where the recipe was itself read from a lock, and the model or the text is not what it names.
    """
    seal = Seal(model_sha256, data_sha256, dict(versions))
    if recipe.source.seal is not None:
        _refuse(recipe.source.name, _changed_inputs(recipe.source.seal, seal), "remove its `lock:` section")
    words = recipe.model_dump(mode="json", exclude_none=True)
    text = _HEADER + yaml.dump(words | {KEY: section_of(seal, words)}, Dumper=Dumper, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_lock(path: Path) -> Recipe:
    """The recipe of a lock; `recipe.source.seal` holds what it was run with. Raises RecipeError, also if edited."""
    recipe = load_recipe(path)
    if recipe.source.seal is None:
        raise RecipeError(f"{path}: has no `lock:` section; a run writes one to its recipe.lock.yaml")
    return recipe


def verify_lock(path: Path, recipe: Recipe, model_sha256: str, data_sha256: str) -> None:
    """Refuse to go on with a run under another recipe, model or text than it was begun with.

    Raises RecipeError with one line per difference.
    """
    now = Seal(model_sha256, data_sha256, versions())
    _refuse(str(path), lock_differences(path, recipe, now)[0], "begin another run with --overwrite or --set output=…")


def lock_differences(path: Path, recipe: Recipe, now: Seal) -> tuple[list[str], list[str]]:
    """What differs between a lock and now: first what makes another run of it, then versions of libraries."""
    locked = read_lock(path)
    then = locked.source.seal
    assert then is not None  # read_lock has looked
    old, new = locked.model_dump(mode="json"), recipe.model_dump(mode="json")
    words = [f"{key} was {old[key]!r}, is {new[key]!r}" for key in old if old[key] != new[key]]
    names = sorted(then.versions.keys() | now.versions.keys())
    pairs = [(n, then.versions.get(n, "absent"), now.versions.get(n, "absent")) for n in names]
    return words + _changed_inputs(then, now), [f"{n} was {a}, is {b}" for n, a, b in pairs if a != b]


def _changed_inputs(then: Seal, now: Seal) -> list[str]:
    pairs = (
        ("the model's sha256", then.model_sha256, now.model_sha256),
        ("the calibration tokens' sha256", then.data_sha256, now.data_sha256),
    )
    return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]


def _refuse(where: str, differences: list[str], remedy: str) -> None:
    if differences:
        raise RecipeError(*(f"{where}: {d}" for d in differences), f"{where}: to go on, undo this, or {remedy}")
