"""recipe.lock.yaml: a recipe with every default filled in and what it was run with; running it gives the same bytes.

A lock is a recipe: `quantbench calibrate runs/demo/recipe.lock.yaml` runs it again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from quantbench.errors import RecipeError
from quantbench.recipes.load import recipe_of
from quantbench.recipes.schema import Recipe
from quantbench.recipes.seal import KEY, Seal, take_seal
from quantbench.recipes.source import Dumper, parse

_HEADER = "# Written by quantbench: the recipe of this run with every default, and what it was run with.\n"


@dataclass(frozen=True)
class Lock:
    """A recipe and what it was run with."""

    recipe: Recipe
    seal: Seal


def write_lock(
    recipe: Recipe, path: Path, model_sha256: str, data_sha256: Mapping[str, str], versions: Mapping[str, str]
) -> Path:
    """Write the lock, atomically. `data_sha256` maps the name of every text of the recipe to its hash."""
    words = recipe.model_dump(mode="json", exclude_none=True)
    seal = Seal(model_sha256, dict(data_sha256), dict(versions))
    text = _HEADER + yaml.dump(words | {KEY: seal.section(words)}, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def load_lock(path: Path) -> Lock:
    """Read a lock. Raises RecipeError where it is absent, is no lock, or was edited."""
    try:
        document = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read as a lock: {getattr(e, 'strerror', None) or 'not UTF-8'}") from None
    seal = take_seal(document)
    if seal is None and not document.problems:
        raise RecipeError(f"{path}: has no `lock:` section; a run writes one to its recipe.lock.yaml")
    recipe = recipe_of(document, (), path.stem)
    assert seal is not None  # else recipe_of has raised
    return Lock(recipe, seal)


def verify_lock(lock: Lock, current: Lock) -> list[str]:
    """What differs between a lock and now, one line each: words of the recipe, model, texts, versions."""
    then, now = lock.recipe.model_dump(mode="json"), current.recipe.model_dump(mode="json")
    differences = [f"recipe: {key} was {then[key]!r}, is {now[key]!r}" for key in then if then[key] != now[key]]
    if lock.seal.model_sha256 != current.seal.model_sha256:
        differences.append(f"model: sha256 was {lock.seal.model_sha256}, is {current.seal.model_sha256}")
    for kind, old, new in (
        ("data", lock.seal.data_sha256, current.seal.data_sha256),
        ("version", lock.seal.versions, current.seal.versions),
    ):
        names = sorted(old.keys() | new.keys())
        differences += [
            f"{kind} of {n}: was {old.get(n, 'absent')}, is {new.get(n, 'absent')}"
            for n in names
            if old.get(n) != new.get(n)
        ]
    return differences
