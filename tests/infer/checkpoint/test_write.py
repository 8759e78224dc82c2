"""Checkpoints: what is written is what was meant, whole or not at all, and the same bytes every time."""

from __future__ import annotations

import numpy as np
import pytest

from quantbench.infer.checkpoint.source import open_model
from quantbench.quantizers.weight import quantize_weight

from .conftest import table_of, variant_of

CASES = {
    "a8w8": {},
    "a8w8_dynamic": {"dynamic": True},
    "weight_only_int8": {},
    "weight_only_int4": {},
}


@pytest.mark.parametrize(
    "mode", ["a8w8", "a8w8_fp8", "weight_only_int8", "weight_only_int4", "a8w8c8", "a8w8_fp8c8_fp8", "bf16c8"]
)
def test_round_trip(make_model, write_checkpoint, mode):
    source = open_model(make_model())
    variant = variant_of(mode, source)
    back = open_model(write_checkpoint(source, variant))
    table = table_of(source, variant)
    for name, plan in variant.layers.items():
        linear = back.linear(name)
        if plan.quantized:
            expected = quantize_weight(source.float_tensor(f"{name}.weight"), table[f"{name}.weight"])
            assert np.array_equal(linear.weight.codes, expected.codes)
            assert np.array_equal(linear.weight.scale, expected.scale)
            assert linear.activations == plan.activations
