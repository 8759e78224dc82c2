"""An engine with a prefix is the engine whose every prompt begins with the prefix's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quantbench.errors import RequestError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.engine import BeamParams, Engine, Request, SamplingParams
from quantbench.infer.models import block_prefix

Load = Callable[..., Engine]
LENGTHS = [1, 3, 63, 64, 70, 130]  # of prefixes: within a page, a whole one, more than one
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def random_ids(length: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(1, 97, length)]


def prefix_of(engine: Engine, ids: list[int]) -> Prefix:
    """What an engine without a prefix has in its cache behind `ids`."""
    taps = engine.trace(ids).taps
    k, v = (
        np.stack([taps[f"{block_prefix(n)}.{side}"].values.transpose(1, 0, 2) for n in range(engine.config.num_layers)])
        for side in "kv"
    )
    return Prefix(tuple(ids), k, v)


def pair(load: Load, length: int, name: str = "llama", **options: Any) -> tuple[Engine, Engine, list[int]]:
    plain, ids = load(name), random_ids(length, length)
    return plain, load(name, prefix=prefix_of(plain, ids), **options), ids


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_scores_and_traces_are_those_behind_the_tokens(length: int, chunk: int, load: Load) -> None:
    plain, prefixed, ids = pair(load, length, chunk=chunk)
    text = random_ids(90, 5)
    whole, trace = plain.trace(ids + text), prefixed.trace(text)
    np.testing.assert_allclose(prefixed.score(text), whole.logits[length:], atol=2e-4)
    np.testing.assert_allclose(trace.logits, whole.logits[length:], atol=2e-4)
    np.testing.assert_allclose(trace.hidden[-1], whole.hidden[-1][length:], atol=2e-4)
    starts = [start for start, _ in prefixed.score_chunks(text)]
    assert starts == list(range(0, 90, chunk))


@pytest.mark.parametrize("name", ["qwen2_windowed", "qwen3", "mistral", "llama_bfloat16"])
def test_every_family(name: str, load: Load) -> None:
    plain, prefixed, ids = pair(load, 5, name)
    text = random_ids(40, 5)
    expected = plain.score(ids + text)[5:]
    np.testing.assert_allclose(prefixed.score(text), expected, atol=0.05 if name.endswith("16") else 2e-4)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reuse", [True, False])
def test_batched_or_alone_the_tokens_are_the_same(length: int, reuse: bool, load: Load) -> None:
    plain, prefixed, ids = pair(load, length, prefix_reuse=reuse, max_batch=3, chunk=40)
    prompts = [random_ids(n, n) for n in (1, 60, 130, 64, 2)]
    prompts.append([*prompts[2][:128], 9])  # shares pages with another
    together = prefixed.generate(prompts, GREEDY)
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.ids == plain.generate([ids + prompt], GREEDY)[0].ids
        assert answer.ids == prefixed.generate([prompt], GREEDY)[0].ids
        assert answer.prompt_tokens == len(prompt)


def test_preempted_sequences_get_their_prefix_again(load: Load) -> None:
    plain, prefixed, ids = pair(load, 3, cache_tokens=192, max_batch=2)
    long = SamplingParams(max_tokens=150, ignore_eos=True)
    numbers = [prefixed.add(Request(random_ids(20, n), long)) for n in (1, 2, 3)]
    got: dict[int, list[int]] = {n: [] for n in numbers}
    while not prefixed.idle:
        for output in prefixed.step():
            got[output.request].append(output.token)
    assert prefixed.scheduler.preemptions > 0
    for seed, number in zip((1, 2, 3), numbers, strict=True):
        assert got[number] == plain.generate([ids + random_ids(20, seed)], long)[0].ids
    assert prefixed.runner.cache.pool.available == prefixed.runner.cache.pool.pages


def test_reuse_counts_tokens_of_the_prompt_only(load: Load) -> None:
    _, prefixed, _ = pair(load, 3)
    prompt = random_ids(130, 1)
    assert prefixed.generate([prompt], GREEDY)[0].reused_tokens == 0
    assert (
        prefixed.generate([prompt], GREEDY)[0].reused_tokens == 125
    )  # two pages, three slots of which are no prompt's


@pytest.mark.parametrize("length", [3, 64])
def test_beams(length: int, load: Load) -> None:
    plain, prefixed, ids = pair(load, length)
    params = BeamParams(beams=3, max_tokens=70, ignore_eos=True)
    prompt = random_ids(10, 1)
    ours, expected = prefixed.beam_search(prompt, params), plain.beam_search(ids + prompt, params)
    assert [b.ids for b in ours] == [b.ids for b in expected]
    assert prefixed.runner.cache.pool.available == prefixed.runner.cache.pool.pages


def test_repetition_is_counted_without_the_prefix(load: Load) -> None:
    plain = load("llama")
    repeats = SamplingParams(max_tokens=1, repetition_penalty=50.0, ignore_eos=True)
    likeliest = int(plain.score([5, 7])[-1].argmax())
    prefixed = load("llama", prefix=prefix_of(plain, [likeliest]))
    expected = int(plain.score([likeliest, 5, 7])[-1].argmax())
    assert prefixed.generate([[5, 7]], repeats)[0].ids == [expected]


def test_limits_are_those_of_the_prompt_alone(load: Load) -> None:
    _, prefixed, _ = pair(load, 12)
    says = (
        "501 tokens are more than the 499 allowed by the model's positions, 12 of which the checkpoint's prefix takes"
    )
    with pytest.raises(RequestError, match=says):
        prefixed.add(Request([1] * 501))
    assert len(prefixed.generate([[1] * 490], SamplingParams(max_tokens=99, ignore_eos=True))[0].ids) == 10
    assert prefixed.score([1] * 500).shape == (500, 97)
    assert prefixed.operations_per_token(10) == load("llama").operations_per_token(22)


def test_a_prefix_takes_no_room_from_the_cache_that_was_asked_for(load: Load) -> None:
    _, prefixed, _ = pair(load, 3, cache_tokens=64, max_batch=1)
    assert prefixed.limits.max_length == 64
    assert len(prefixed.generate([[1] * 60], SamplingParams(max_tokens=9, ignore_eos=True))[0].ids) == 4


def test_windows_behind_a_prefix_end_at_the_trained_length_of_dynamic_rope(load: Load) -> None:
    _, prefixed, _ = pair(load, 4, "llama_dynamic")
    with pytest.raises(RequestError, match="4 of which the checkpoint's prefix takes"):
        prefixed.score([1] * 61)
    assert prefixed.score([1] * 60).shape == (60, 97)
