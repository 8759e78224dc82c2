"""Many requests at once on the GPU: batched, chunked, preempted or alone, each gives the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model

from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.engine import Engine, SamplingParams

REQUESTS = 256


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    return write_tiny_model(tmp_path_factory.mktemp("requests") / "m", max_position_embeddings=4096, **shape)


@pytest.mark.parametrize(
    "mode", ["bf16", "a8w8", "a8w8_fp8", "weight_only_int4", "bf16c8_dynamic", "a8w8_fp8c8_fp8_dynamic"]
)
def test_256_requests_of_mixed_lengths_equal_one_by_one(mode: str, gpu: Device, model: Path) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 500, random.integers(16, 2049)).tolist() for _ in range(REQUESTS)]
    lengths = random.integers(1, 513, REQUESTS)
    params = [SamplingParams(max_tokens=int(n), ignore_eos=True, detokenize=False) for n in lengths]
    ops = CudaOps("float32")
    engine = Engine.load(model, mode, ops=ops, max_batch=64, chunk=1024, cache_tokens=60_000)
    together = [c.ids for c in engine.generate(prompts, params)]
    assert [len(ids) for ids in together] == lengths.tolist()
    alone = Engine.load(model, mode, ops=ops, max_batch=1, chunk=512)
    some = range(0, REQUESTS, 1 if mode == "a8w8" else 8)
    different = [i for i in some if alone.generate([prompts[i]], params[i])[0].ids != together[i]]
    ops.device.release()
    assert not different


def test_sampling_repeats_with_its_seed_and_is_the_cpus_where_logits_are(gpu: Device, model: Path) -> None:
    prompts = [[3, 5, 7], [11, 2] * 40]
    params = [
        SamplingParams(max_tokens=24, temperature=0.8, top_k=40, top_p=0.9, seed=s, ignore_eos=True) for s in (1, 2)
    ]
    ops = CudaOps("float32")
    engine = Engine.load(model, "fp32", ops=ops)
    first = [c.ids for c in engine.generate(prompts, params)]
    assert first == [c.ids for c in engine.generate(prompts, params)]
    assert first == [c.ids for c in Engine.load(model, "fp32").generate(prompts, params)]
    ops.device.release()
