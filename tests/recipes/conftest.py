"""A small Llama as the plan sees it: names, shapes and facts, no weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quantbench.errors import RecipeError
from quantbench.infer.models import LINEARS, block_prefix, linear_names, linear_shapes, model_tensors
from quantbench.infer.models.config import ModelConfig, Rope
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.load import load_recipe

CONFIG = ModelConfig(
    family="llama", vocab_size=320, hidden_size=192, intermediate_size=384, num_layers=3, num_heads=6, num_kv_heads=2,
    head_dim=32, norm_eps=1e-5, rope=Rope(), max_positions=512, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip


def elements(config: ModelConfig) -> int:
    """Of every tensor that is no linear's weight."""
    total = 0
    for name, shape in model_tensors(config).items():
        if name.removesuffix(".weight") not in linear_names(config):
            product = 1
            for n in shape:
                product *= n
            total += product
    return total


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def layers(config: ModelConfig) -> dict[str, Shape]:
    shapes = linear_shapes(config) | {"lm_head": (config.vocab_size, config.hidden_size)}
    return {name: shapes[name.split(".", 3)[-1]] for name in linear_names(config)}


@pytest.fixture
def facts(config: ModelConfig) -> ModelFacts:
    groups = {f"{block_prefix(i)}.{n.name}": f"{block_prefix(i)}.{n.fused}" for i in range(3) for n in LINEARS}
    return ModelFacts(
        name="tiny", family="llama", dtype=config.dtype, num_layers=3, hidden_size=192, intermediate_size=384,
        vocab_size=320, num_kv_heads=2, head_dim=32, float_elements=elements(config), tied_head=True, groups=groups,
    )  # fmt: skip


@pytest.fixture
def problems_of() -> Callable[..., tuple[str, ...]]:
    """The complaints of a recipe text (with `model: m` put on its first line)."""

    def run(text: str, *overrides: str) -> tuple[str, ...]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(f"model: m\n{text}\n", overrides)
        return caught.value.problems

    return run
