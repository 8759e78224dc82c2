"""The recipes in the tutorial are recipes, and the thresholds in docs/report.md are the ones in force."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from quantbench.recipes.schema import Recipe
from quantbench.reports import advice

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = re.findall(r"```yaml\n(.*?)```", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("text", [block for block in BLOCKS if "script:" not in block])
def test_recipes_of_the_tutorial(text: str) -> None:
    Recipe.model_validate({"model": "m", "modes": ["a8w8"]} | yaml.safe_load(text))


def test_every_rule_is_documented_with_its_threshold() -> None:
    text = (DOCS / "report.md").read_text(encoding="utf-8").partition("## report.json")[0]
    row = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    assert f"under {advice.LEVELS_LOST:g} steps" in row["outlier_input"]
    assert f"under {advice.LEVELS_FEW:g} steps" in row["outlier_input"]
    assert f"+{advice.INCREASE_UNUSABLE:.0%} or more | +{advice.INCREASE_NOTICEABLE:.0%} or more" in row["perplexity"]
    assert f"{advice.FP8_REACH:,.0f} times" in row["fp8_underflow"]
    assert f"under {advice.INPUT_DB:g} dB" in row["noisy_input"]
    assert f"under {advice.CACHE_DB:g} dB" in row["noisy_cache"]
    assert (
        "int8 under {int8:g} dB, int4 under {int4:g} dB, fp8 under {fp8_e4m3:g} dB".format(**advice.WEIGHT_DB)
        in row["noisy_weight"]
    )
    assert f"top-1 under {advice.SERVED_TOP1:.1%}" in row["parity"]
    rules = {"parity", "parity_codes", "perplexity", "noisy_cache", "slower"} | {r.__name__ for r in advice.LAYER_RULES}
    assert rules <= set(row)
