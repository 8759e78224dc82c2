"""Every sum in double: the GPU's results are the reference's, bit for bit but for a rounding in many millions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model

from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.ops import FLOAT

from .conftest import poisoned
from .linears import CASES, REFERENCE, SIZES, inputs_of, run, weight_of


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_linears(gpu: Device, case: str, size: tuple[int, int, int]) -> None:
    device, (tokens, n, k) = poisoned(gpu, "exact"), size
    k = k // 128 * 128 if case == "w4-128" else k
    weight = weight_of(case, n, k)
    a = inputs_of(device, weight, tokens, k)
    assert np.mean(run(device, a, weight) == REFERENCE.linear(a, REFERENCE.pack([weight]))) > 0.9999


def test_swiglu(gpu: Device) -> None:
    ops = CudaOps("exact")
    x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) * 8
    assert np.mean(ops.silu_mul(x, FLOAT).values == REFERENCE.silu_mul(x, FLOAT).values) > 0.9999


@pytest.mark.parametrize("mode", ["fp32", "bf16", "a8w8", "a8w8_fp8", "weight_only_int4", "a8w8c8_dynamic"])
def test_a_model_scores_and_generates_as_the_reference(mode: str, gpu: Device, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    model = write_tiny_model(tmp_path / "m", max_position_embeddings=1024, **shape)
    ids = np.random.default_rng(0).integers(1, 500, 300).tolist()
    prompts = [ids[:100], ids[:3], ids[50:180]]
    params = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
    engines = [Engine.load(model, mode, ops=ops, cache_tokens=4096) for ops in (CudaOps("exact"), "reference")]
    here, there = (engine.score(ids) for engine in engines)
    assert np.mean(here == there) > 0.999
    assert np.abs(here - there).max() <= 1e-5 * np.abs(there).max()
    first, second = ([c.ids for c in engine.generate(prompts, params)] for engine in engines)
    assert first == second
