from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.infer.engine.cache import KVCache, PagePool, page_key, pages_for, token_bytes
from quantbench.infer.models import ModelConfig, Rope

CONFIG = ModelConfig("llama", 10, 8, 8, 3, 4, 2, 16, 1e-5, Rope(), 128, True, "float32")


def test_pages_are_taken_and_given_back() -> None:
    pool = PagePool(3)
    first = pool.allocate(2)
    assert first == [0, 1]
    assert pool.allocate(2) is None
    assert pool.available == 1
    pool.release(first)
    assert pool.available == 3


def test_a_shared_page_lives_until_its_last_user_leaves() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1) or []
    pool.share(page)
    pool.release([page])
    assert pool.allocate(1) is None
    pool.release([page])
    assert pool.allocate(1) == [page]


def test_a_named_page_is_found_again_until_its_room_is_needed() -> None:
    pool = PagePool(2)
    old, new = pool.allocate(2) or []
    pool.name(old, b"old")
    pool.name(new, b"new")
    pool.release([old])
    pool.release([new])
    assert pool.share(pool.find(b"old") or 0) == old  # now the more recently used
    pool.release([old])
    assert pool.allocate(1) == [new]
    assert pool.find(b"new") is None
    assert pool.find(b"old") == old


def test_the_end_of_a_prefix_is_dropped_before_its_beginning() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2) or []
    for i, page in enumerate(pages):
        pool.name(page, bytes([i]))
    pool.release(pages)
    pool.allocate(1)
    assert pool.find(b"\0") == pages[0]
    assert pool.find(b"\1") is None


def test_of_two_pages_with_one_name_the_first_is_found() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2) or []
    pool.name(first, b"x")
    pool.name(second, b"x")
    pool.release([second])
    assert pool.find(b"x") == first
    assert pool.available == 1


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "share", "name"]), st.integers(0, 7)), max_size=60))
def test_no_page_is_lost_or_given_twice(steps: list[tuple[str, int]]) -> None:
    pool, held = PagePool(5), list[int]()
    for number, (step, i) in enumerate(steps):
        if step == "take":
            held += pool.allocate(i % 3) or []
        elif held and step == "give":
            pool.release([held.pop(i % len(held))])
        elif held and step == "share":
            held.append(pool.share(held[i % len(held)]))
        elif held:
            pool.name(held[i % len(held)], bytes([number]))
        assert pool.available == 5 - len(set(held))
    pool.release(held)
    assert sorted(pool.allocate(5) or []) == [0, 1, 2, 3, 4]


def test_a_page_is_named_after_its_tokens_and_all_before_them() -> None:
    ids = list(range(64))
    assert page_key(b"", ids) == page_key(b"", ids)
    assert page_key(b"", ids) != page_key(b"", ids[::-1])
    assert page_key(page_key(b"", ids), ids) != page_key(b"", ids)


@pytest.mark.parametrize(
    ("cache_format", "width"),
    [("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1), ("int8_dynamic", 1), ("fp8_e4m3_dynamic", 1)],
)
def test_sizes(cache_format: str, width: int) -> None:
    cache = KVCache(CONFIG, cache_format, 65, [None] * 3)
    assert pages_for(64) == 1
    assert cache.pool.pages == 2
    assert cache.layers[0].k.shape == (2, 2, 64, 16)
    assert cache.layers[0].k.dtype.itemsize == width
    assert cache.nbytes == 128 * token_bytes(CONFIG, cache_format)


def test_a_dynamic_cache_has_a_scale_per_token_and_head() -> None:
    cache = KVCache(CONFIG, "int8_dynamic", 65, [None] * 3)
    assert cache.layers[0].dynamic
    assert cache.layers[0].k_scale.shape == (2, 2, 64)
    assert token_bytes(CONFIG, "int8_dynamic") == token_bytes(CONFIG, "int8") * (16 + 4) / 16
    for number, array in enumerate(cache.layers[1].arrays):
        array[0] = number + 1
    cache.copy(0, 1)
    assert [array[1].astype(int).min() for array in cache.layers[1].arrays] == [1, 2, 3, 4]


def test_scales_belong_to_their_layer_and_are_one_for_a_float_cache() -> None:
    scales = [(np.full(2, i, np.float32), np.full(2, i + 10, np.float32)) for i in range(3)]
    cache = KVCache(CONFIG, "int8", 64, list(scales))
    assert cache.layers[2].k_scale.tolist() == [2, 2]
    assert cache.layers[1].v_scale.tolist() == [11, 11]
    assert KVCache(CONFIG, "float32", 64, [None] * 3).layers[0].k_scale.tolist() == [1, 1]
