from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.cuda.forward import DeviceModel
from quantbench.infer.cuda.runner import CudaRunner
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.engine.forward import Model


def damage(engine: Engine, layer: int | None, value: float) -> None:
    """Puts `value` into a norm of `layer`, or into the final norm."""
    model: Model = engine.runner.model
    if layer is None:
        model.norm[3] = value
    else:
        norm = model.layers[layer].mlp_norm.copy()
        norm[3] = value
        layers = list(model.layers)
        layers[layer] = replace(layers[layer], mlp_norm=norm)
        engine.runner.model = replace(model, layers=tuple(layers))
    if isinstance(engine.runner, CudaRunner):
        engine.runner.weights = DeviceModel.upload(engine.runner.device, engine.runner.model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("layer", "name"),
    [(0, "model.layers.0: its"), (1, "model.layers.1: its"), (None, "the final norm or lm_head: its")],
)
def test_a_float_model_that_is_not_finite_is_reported_with_its_layer(
    layer: int | None, name: str, value: float, load: Callable[..., Engine]
) -> None:
    engine = load("llama", "bf16")
    damage(engine, layer, value)
    with np.errstate(invalid="ignore"):
        for call in (lambda: engine.score([1, 2, 3]), lambda: engine.generate([[1, 2]], SamplingParams())):
            with pytest.raises(CheckpointError, match=f"^{name} output has a NaN or an infinity: a weight is damaged"):
                call()
    assert engine.idle
    assert engine.runner.cache.pool.available == engine.runner.cache.pool.pages
