"""A cache whose scales are found for every token and head as it is written: no calibration, every column."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.models import block_prefix
from quantbench.quantizers.activation import quantize_heads

Load = Callable[..., Engine]
RANDOM = np.random.default_rng(31)
PROMPTS = [RANDOM.integers(1, 97, n).tolist() for n in (3, 70, 41, 130, 12)]
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
CACHES = {"c8_dynamic": "int8", "c8_fp8_dynamic": "fp8_e4m3"}


@pytest.mark.parametrize("suffix", CACHES)
def test_requests_do_not_see_each_other(suffix: str, load: Load) -> None:
    """Batched, chunked, on shared pages and after preemption: the tokens that each prompt gets alone."""
    engine = load("llama", f"a8w8{suffix}", max_batch=3, chunk=50)
    apart = load("llama", f"a8w8{suffix}", prefix_reuse=False)
    together = [c.ids for c in engine.generate(PROMPTS, GREEDY)]
    assert together == [apart.generate([p], GREEDY)[0].ids for p in PROMPTS]
    assert [c.ids for c in engine.generate(PROMPTS, GREEDY)] == together  # pages found again
    tight = load("llama", f"a8w8{suffix}", cache_tokens=256)
    assert [c.ids for c in tight.generate(PROMPTS, GREEDY)] == together
    assert tight.scheduler.preemptions > 0


@pytest.mark.parametrize("name", ["llama", "llama_odd", "qwen3", "qwen2_windowed"])
@pytest.mark.parametrize("suffix", CACHES)
def test_a_trace_holds_codes_and_a_scale_per_token_and_head(suffix: str, name: str, load: Load) -> None:
    exact, held = load(name, "fp32").trace(PROMPTS[3]), load(name, f"fp32{suffix}", chunk=60).trace(PROMPTS[3])
    for side in "kv":
        tap, want = held.taps[f"model.layers.0.{side}"], exact.taps[f"model.layers.0.{side}"]
        assert tap.codes is not None
        assert tap.scale is not None
        assert tap.scale.shape == want.values.shape[:2]
        codes, scale = quantize_heads(want.values, CACHES[suffix])
        np.testing.assert_allclose(tap.scale, scale, rtol=1e-5)
        assert (tap.codes.astype(np.float32) != codes.astype(np.float32)).mean() < 1e-2
        assert np.array_equal(tap.values, tap.codes.astype(np.float32) * tap.scale[..., None])


@pytest.mark.parametrize(("suffix", "most"), [("c8_dynamic", 0.02), ("c8_fp8_dynamic", 0.15)])
def test_scores_are_near_those_of_a_float_cache(suffix: str, most: float, load: Load) -> None:
    exact, near = load("llama", "fp32").score(PROMPTS[3]), load("llama", f"fp32{suffix}", chunk=60).score(PROMPTS[3])
    assert 0 < np.linalg.norm(near - exact) < most * np.linalg.norm(exact)


@pytest.mark.parametrize("length", [5, 64, 70])
def test_a_prefix_comes_with_its_scales(length: int, load: Load) -> None:
    plain, ids = load("llama", "fp32c8_dynamic"), RANDOM.integers(1, 97, length).tolist()
    taps = load("llama", "fp32").trace(ids).taps
    k, v = (np.stack([taps[f"{block_prefix(n)}.{side}"].values.transpose(1, 0, 2) for n in range(2)]) for side in "kv")
    behind = load("llama", "fp32c8_dynamic", prefix=Prefix(tuple(ids), k, v))
    want = plain.score(ids + PROMPTS[2])[length:]
    got = behind.score(PROMPTS[2])
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)  # layer 1 of the prefix saw float layers
    assert behind.generate([PROMPTS[2]], GREEDY)[0].ids == behind.generate([PROMPTS[2]] * 2, GREEDY)[1].ids


def test_what_a_token_costs(load: Load) -> None:
    fixed, dynamic = load("llama", "fp32"), load("llama", "fp32c8_dynamic")
    assert dynamic.mode.cache == "int8_dynamic"
    heads = 2 * 2 * 2  # layers, sides, KV heads of 16
    saved = fixed.bytes_per_token(1, 100) - dynamic.bytes_per_token(1, 100)
    assert saved == 100 * heads * (16 * 4 - (16 + 4))
    tokens = dynamic.limits.cache_tokens
    assert dynamic.memory["cache_bytes"] == tokens * heads * (16 + 4)
