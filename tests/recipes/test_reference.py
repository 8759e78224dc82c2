"""docs/recipes.md is what the schema says today, and its examples are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quantbench.recipes import sections
from quantbench.recipes.load import load_recipe
from quantbench.recipes.reference import reference
from quantbench.recipes.schema import Recipe, Rule, Variant

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m quantbench.recipes.reference > docs/recipes.md"
    )


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", reference(), re.S))
def test_its_examples_load(example: str) -> None:
    head = "" if "model:" in example else "model: m\n"
    modes = "modes: [{name: a8w8-static, mode: a8w8}]\n" if "a8w8-static]" in example else ""
    load_recipe(head + modes + example)


def test_every_word_is_explained() -> None:
    page = reference()
    models: list[type[BaseModel]] = [Recipe, Rule, Variant]
    models += [m for m in vars(sections).values() if isinstance(m, type) and issubclass(m, sections.Section)]
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert f"| `{name}` |" in page
