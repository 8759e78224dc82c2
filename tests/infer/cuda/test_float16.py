"""float16 between operations: products, a whole model, and weights that float16 cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny import write_tiny_model

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import layout
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import F16
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.cuda.report import Notes
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.ops.pack import parts_of

from .conftest import poisoned
from .linears import SIZES, assert_close, inputs_of, run, weight_of


@pytest.fixture
def device_f16(gpu: Device) -> Device:
    return poisoned(gpu, "float16")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_float_weights_are_held_in_float16(device_f16: Device, dtype: Any, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    weight = LinearWeight("w", np.random.default_rng(0).standard_normal((n, k)).astype(dtype), None)
    a = inputs_of(device_f16, weight, tokens, k)
    held = LinearWeight("w", weight.weight.astype(np.float16).astype(np.float32), None)
    assert_close(run(device_f16, a, weight), a, held, 3e-5)
    assert_close(run(device_f16, a, weight, dtype=np.float16), a, held, 2e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["int8-int8", "w8", "w4-64-zero", "w4-128", "w4"])
def test_quantized_weights(device_f16: Device, case: str, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    k = k // 128 * 128 if case == "w4-128" else k
    weight = weight_of(case, n, k)
    a = inputs_of(device_f16, weight, tokens, k)
    assert_close(run(device_f16, a, weight), a, weight, 1e-3)


@pytest.mark.parametrize("mode", ["fp16", "bf16", "a8w8", "weight_only_int4"])
def test_a_model_scores_and_generates_as_in_float32(mode: str, gpu: Device, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    model = write_tiny_model(tmp_path / "m", max_position_embeddings=1024, **shape)
    ids = np.random.default_rng(0).integers(1, 500, 200).tolist()
    scores = []
    for dtype in ("float32", "float16"):
        ops = CudaOps(dtype)
        engine = Engine.load(model, mode, ops=ops, chunk=128)
        scores.append(engine.score(ids))
        params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
        assert len(engine.generate([ids[:50], ids[:3]], params)[1].ids) == 8
        ops.device.release()
    wide, narrow = scores
    near = 0.06 if mode == "a8w8" else 0.02  # a code that falls the other way is a step of its own
    assert np.linalg.norm(narrow - wide) < near * np.linalg.norm(wide)


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    weight = LinearWeight("model.layers.0.mlp.down_proj", np.full((16, 16), 7e4, np.float32), None)
    (part,) = parts_of([weight])
    said = r"model\.layers\.0\.mlp\.down_proj: a weight of magnitude 70000 is beyond float16's 65504; "
    with pytest.raises(CheckpointError, match=said + "set QUANTBENCH_CUDA_DTYPE to bfloat16 or float32"):
        layout.pack(Notes("sm_90a", "float16"), part)


def test_bfloat16_weights_are_packed_as_float16() -> None:
    weight = LinearWeight("w", np.ones((16, 16), ml_dtypes.bfloat16), None)
    (part,) = parts_of([weight])
    packed = layout.pack(Notes("sm_90a", "float16"), part)
    assert (packed.kind, packed.codes.dtype) == (F16, np.float16)
    assert layout.pack(Notes("sm_90a", "bfloat16"), part).kind != F16
