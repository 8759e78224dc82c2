"""Read a recipe: find it, parse it with line numbers, apply `--set`, check it, and list every mistake at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from quantbench.errors import RecipeError, unknown
from quantbench.recipes.bundled import list_presets, preset_path
from quantbench.recipes.checks import contradictions
from quantbench.recipes.explain import explain
from quantbench.recipes.overrides import apply_overrides
from quantbench.recipes.schema import Recipe
from quantbench.recipes.seal import KEY, take_seal
from quantbench.recipes.source import Document, Path, parse


def load_recipe(path_or_text: str | FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, in a text with line breaks, or bundled under that name, with `--set` options applied.

    Raises RecipeError with one line per mistake: `recipe.yaml:12: weights.format: unknown key …`.
    """
    text, name, stem = _read(path_or_text)
    document = parse(text, name)
    document.source.seal, problem = take_seal(document.tree)
    if problem:
        document.problems.append(document.source.problem((KEY,), problem))
    return recipe_of(document, overrides, stem)


def recipe_of(document: Document, overrides: Sequence[str], stem: str) -> Recipe:
    """Check a parsed document. `stem` names the run folder where the recipe does not. Raises RecipeError."""
    if not document.problems or document.tree:
        apply_overrides(document, overrides)
        document.tree.setdefault("output", f"runs/{stem}")
        recipe, problems = _validated(document)
        document.problems.extend(document.source.listed(problems))
    if document.problems:
        raise RecipeError(*document.problems)
    return recipe.written_at(document.source)


def _validated(document: Document) -> tuple[Recipe, list[tuple[Path, str]]]:
    """The recipe, with what is wrong in it. Contradictions are looked for between the sections that are sound."""
    try:
        return (recipe := Recipe.model_validate(document.tree)), contradictions(recipe, set())
    except ValidationError as e:
        problems = explain(e, Recipe)
        damaged = {str(error["loc"][0]) for error in e.errors() if error["loc"]}
        recipe = Recipe.model_validate(_sound(document.tree, damaged))
        return recipe, problems + contradictions(recipe, damaged)


def _sound(tree: dict[str, Any], damaged: set[str]) -> dict[str, Any]:
    return {"model": "-"} | {k: v for k, v in tree.items() if k not in damaged}


def _read(path_or_text: str | FilePath) -> tuple[str, str, str]:
    """Text, name for messages, stem for the run folder."""
    if isinstance(path_or_text, str) and "\n" in path_or_text:
        return path_or_text, "recipe", "recipe"
    presets = [p.name for p in list_presets()]
    path = FilePath(path_or_text)
    if not path.exists() and str(path_or_text) in presets:
        path = preset_path(str(path_or_text))
        return path.read_text(encoding="utf-8"), path.name, path.stem
    try:
        return path.read_text(encoding="utf-8"), str(path), path.stem
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file, and {unknown('bundled recipe', str(path), presets)}") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read as a recipe: {reason}") from None
