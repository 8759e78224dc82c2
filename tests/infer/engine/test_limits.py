from __future__ import annotations

from dataclasses import replace

import pytest

from quantbench.errors import RequestError
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


def test_a_device_gives_what_it_has_left_and_no_more_than_can_be_used() -> None:
    token = token_bytes(SMALL, "int8")
    assert limits_of(SMALL, "int8", None, 4, 512, room=1 << 40).cache_tokens == 4 * 2048
    tight = limits_of(SMALL, "int8", None, 4, 512, room=130 * token)
    assert (tight.cache_tokens, tight.max_length) == (128, 128)
    assert limits_of(SMALL, "int8", 256, 4, 512, room=1).cache_tokens == 256  # asked for: the device will say


def test_no_room_for_a_page_says_what_is_left_and_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"the KV cache: 0 MB are left .* a page of 64 tokens takes .*smaller chunk"):
        limits_of(SMALL, "int8", None, 4, 512, room=-5)


def test_dynamic_rope_bounds_generation_and_scoring_apart() -> None:
    config = replace(SMALL, rope=Rope(kind="dynamic", factor=2.0, original_max_positions=2048))
    limits = limits_of(config, "float32", None, 1, 512)
    assert (limits.max_length, limits.max_window) == (2048, 4096)
    assert "dynamic RoPE" in limits.reason
    assert limits.window_reason == "the model's positions"
