from __future__ import annotations

from dataclasses import replace

from quantbench.infer.engine.cache import token_bytes
from quantbench.infer.engine.limits import CACHE_BYTES, limits_of
from quantbench.infer.models import ModelConfig, Rope

SMALL = ModelConfig("llama", 10, 64, 8, 3, 4, 2, 16, 1e-5, Rope(), 2048, True, "float32")


def test_a_cache_nobody_sized_holds_the_longest_sequence_and_a_full_batch() -> None:
    assert limits_of(SMALL, "float32", None, 2, 512).cache_tokens == 2048
    assert limits_of(SMALL, "float32", None, 32, 512).cache_tokens == 32 * 512
    assert limits_of(SMALL, "float32", None, 32, 512).max_length == 2048


def test_but_no_more_than_a_gibibyte() -> None:
    large = replace(SMALL, num_layers=80, num_kv_heads=8, head_dim=128, max_positions=131072)
    for cache_format in ("float32", "int8"):
        limits = limits_of(large, cache_format, None, 32, 512)
        assert 0 <= limits.cache_tokens * token_bytes(large, cache_format) - CACHE_BYTES < 64 * 4 * 80 * 2 * 8 * 128
        assert limits.max_length == limits.cache_tokens
        assert limits.reason == limits.window_reason == "the cache (cache_tokens at load)"


def test_an_asked_size_is_rounded_up_to_pages() -> None:
    assert limits_of(SMALL, "float32", 65, 1, 512).cache_tokens == 128


def test_dynamic_rope_bounds_generation_and_scoring_apart() -> None:
    config = replace(SMALL, rope=Rope(kind="dynamic", factor=2.0, original_max_positions=2048))
    limits = limits_of(config, "float32", None, 1, 512)
    assert (limits.max_length, limits.max_window) == (2048, 4096)
    assert "dynamic RoPE" in limits.reason
    assert limits.window_reason == "the model's positions"
