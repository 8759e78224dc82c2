"""The engine as its users see it: what is in the batch, how prompts are cut and where pages end changes no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantbench.errors import ModelError, RequestError
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.engine import Engine, Request, SamplingParams

Load = Callable[..., Engine]


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 97, random.integers(1, longest)).tolist() for _ in range(count)]


def mixed_params(count: int) -> list[SamplingParams]:
    """Greedy and sampled requests of different lengths, seeds and filters."""
    random = np.random.default_rng(9)
    return [
        SamplingParams(
            max_tokens=int(random.integers(1, 40)),
            temperature=float(i % 3),
            top_k=i % 4 * 5,
            top_p=1 - 0.1 * (i % 2),
            repetition_penalty=1 + 0.1 * (i % 3),
            seed=i,
        )
        for i in range(count)
    ]


def alone(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [engine.generate([p], q)[0].ids for p, q in zip(prompts, params, strict=True)]


@pytest.mark.parametrize("mode", ["fp32", "a8w8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_request_gives_the_same_tokens_batched_or_alone(name: str, mode: str, load: Load) -> None:
    prompts, params = random_prompts(9, 90), mixed_params(9)
    expected = alone(load(name, mode, prefix_reuse=False), prompts, params)
    batched = load(name, mode, max_batch=4, chunk=50).generate(prompts, params)
    assert [c.ids for c in batched] == expected
    assert len({tuple(ids) for ids in expected}) > 5  # not everybody says the same


def test_greedy_continues_with_the_best_scored_token(load: Load) -> None:
    engine = load("llama")
    prompt = random_prompts(1, 70)[0]
    (answer,) = engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True))
    best = engine.score(prompt + answer.ids)[len(prompt) - 1 : -1].argmax(axis=1)
    assert answer.ids == best.tolist()
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", len(prompt))


def test_a_prompt_in_chunks_equals_one_in_one_piece(load: Load) -> None:
    ids = random_prompts(1, 200, seed=4)[0] + random_prompts(1, 200, seed=5)[0]
    whole = load("llama", chunk=512).score(ids)
    for chunk in (1, 7, 64, 65):
        assert np.abs(load("llama", chunk=chunk).score(ids) - whole).max() < 1e-4


def test_prefix_reuse_changes_no_token_and_saves_work(load: Load) -> None:
    common = random_prompts(1, 2)[0] * 130
    prompts = [common + tail for tail in random_prompts(4, 30)]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    fresh, reusing = load("qwen2", prefix_reuse=False), load("qwen2")
    for prompt in prompts:
        assert reusing.generate([prompt], params)[0].ids == fresh.generate([prompt], params)[0].ids
    assert [reusing.generate([p], params)[0].reused_tokens for p in prompts] == [128] * 4
    assert fresh.generate([common], params)[0].reused_tokens == 0
    exact = common[:128]  # even a prompt that is known whole has its last token computed
    assert reusing.generate([exact], params)[0].reused_tokens == 64


def test_a_preempted_request_gives_the_same_tokens(load: Load) -> None:
    prompts, params = random_prompts(6, 60, seed=3), SamplingParams(max_tokens=100, ignore_eos=True)
    expected = [c.ids for c in load("llama").generate(prompts, params)]
    tight = load("llama", cache_tokens=4 * 64)
    assert [c.ids for c in tight.generate(prompts, params)] == expected
    assert tight.scheduler.preemptions > 0
    assert tight.runner.cache.pool.available == 4


def test_requests_come_and_go_between_steps(load: Load) -> None:
    engine = load("llama", max_batch=2)
    prompts, params = random_prompts(4, 40, seed=6), SamplingParams(max_tokens=8, ignore_eos=True)
    expected = [c.ids for c in load("llama").generate(prompts, params)]
    numbers = [engine.add(Request(p, params)) for p in prompts[:3]]
    got: dict[int, list[int]] = {}
    steps = 0
    while not engine.idle:
        for output in engine.step():
            got.setdefault(output.request, []).append(output.token)
        steps += 1
        if steps == 3:
            numbers.append(engine.add(Request(prompts[3], params)))
    assert [got[n] for n in numbers] == expected
    assert engine.step() == []


def test_generate_and_stream_do_not_swallow_queued_requests(load: Load) -> None:
    engine, params = load("llama"), SamplingParams(max_tokens=3, ignore_eos=True)
    number = engine.add(Request([1, 2], params))
    engine.generate([[5]], params)
    streamed = [token.id for token in engine.stream([5], params)]
    outputs = engine.step()
    assert [o.request for o in outputs] == [number] * 3
    assert outputs[-1].finish_reason == "length"
    assert streamed == engine.generate([[5]], params)[0].ids


def test_two_streams_can_be_read_in_turn(load: Load) -> None:
    engine, params = load("llama"), SamplingParams(max_tokens=5, ignore_eos=True)
    both = list(zip(engine.stream([3], params), engine.stream([4], params), strict=True))
    assert [a.id for a, _ in both] == engine.generate([[3]], params)[0].ids
    assert [b.id for _, b in both] == engine.generate([[4]], params)[0].ids


def test_an_abandoned_stream_and_an_aborted_request_give_their_pages_back(load: Load) -> None:
    engine = load("llama")
    pages = engine.runner.cache.pool.available
    tokens = engine.stream([1, 2, 3])
    next(tokens)
    assert engine.runner.cache.pool.available < pages
    tokens.close()  # type: ignore[attr-defined]
    number = engine.add(Request([1, 2, 3]))
    engine.step()
    engine.abort(number)
    engine.abort(number)
    assert engine.idle
    assert engine.runner.cache.pool.available == pages


def test_stop_tokens_end_the_ids_and_stop_strings_the_text(load: Load) -> None:
    engine = load("llama_text")
    ids = engine.generate([[7, 8]], SamplingParams(max_tokens=12, ignore_eos=True))[0].ids
    text = "".join(chr(33 + i) for i in ids)
    by_id = engine.generate([[7, 8]], SamplingParams(max_tokens=12, stop_token_ids=(ids[4],)))[0]
    end = ids.index(ids[4])
    assert (by_id.ids, by_id.text, by_id.finish_reason) == (ids[: end + 1], text[:end], "stop")
    by_text = engine.generate([[7, 8]], SamplingParams(max_tokens=12, stop=(text[5:7],), ignore_eos=True))[0]
    assert (by_text.text, by_text.finish_reason) == (text[: text.index(text[5:7])], "stop")
    later = engine.generate([[7, 8]], SamplingParams(max_tokens=12, min_tokens=8, stop_token_ids=(ids[4],)))[0]
    assert len(later.ids) >= 8


def test_the_end_of_sequence_token_stops_unless_it_is_ignored(load: Load) -> None:
    engine = load("llama_text")
    params = SamplingParams(max_tokens=300, temperature=3.0)
    stopped = engine.generate([[7]], params)[0]
    assert (stopped.finish_reason, stopped.ids[-1]) == ("stop", 0)
    ignoring = SamplingParams(max_tokens=300, temperature=3.0, ignore_eos=True)
    assert engine.generate([[7]], ignoring)[0].finish_reason == "length"


def test_text_and_streamed_text_are_the_same_and_can_be_left_out(load: Load) -> None:
    engine, params = load("llama_text"), SamplingParams(max_tokens=9, ignore_eos=True)
    answer = engine.generate([[7]], params)[0]
    assert answer.text == "".join(t.text for t in engine.stream([7], params)) == engine.tokenizer.decode(answer.ids)
    silent = SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False)
    assert engine.generate([[7]], silent)[0].text == ""


def test_a_sequence_ends_where_the_models_positions_end(load: Load) -> None:
    engine = load("llama")
    answer = engine.generate([[1] * 500], SamplingParams(max_tokens=100, ignore_eos=True))[0]
    assert (len(answer.ids), answer.finish_reason) == (12, "length")


def test_scoring_leaves_running_requests_alone(load: Load) -> None:
    engine, params = load("llama"), SamplingParams(max_tokens=6, ignore_eos=True)
    stream, got = engine.stream([9, 8, 7], params), []
    for token in stream:
        got.append(token.id)
        engine.score([5] * 100)
    assert got == load("llama").generate([[9, 8, 7]], params)[0].ids


def test_likelihood_is_the_log_softmax_of_the_score(load: Load) -> None:
    ids = [5, 9, 77, 3] * 20
    engine = load("llama", chunk=16)
    logits = engine.score(ids).astype(np.float64)[:-1]
    wanted = np.take_along_axis(logits, np.array(ids[1:])[:, None], 1)[:, 0] - np.logaddexp.reduce(logits, axis=1)
    assert np.abs(engine.likelihood(ids) - wanted).max() < 1e-5


def test_score_chunks_are_the_score(load: Load) -> None:
    engine = load("llama", chunk=30)
    ids = random_prompts(1, 100, seed=8)[0]
    whole = engine.score(ids)
    for start, part in engine.score_chunks(ids):
        assert np.array_equal(part, whole[start : start + len(part)])


def test_costs_and_memory(load: Load) -> None:
    reference = {"ops": "reference"}  # the native column pads rows, and counts what it holds
    engine, untied = load("llama", **reference), load("llama_untied_biased", **reference)
    blocks = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    norms = 5 * 64
    assert engine.memory["weights_bytes"] == 4 * (blocks + 97 * 64 + norms)  # the tied embedding counts once
    assert untied.memory["weights_bytes"] >= 4 * (blocks + 2 * 97 * 64 + norms)
    assert engine.memory["cache_bytes"] == engine.limits.cache_tokens * 2 * 2 * 2 * 16 * 4
    assert engine.operations_per_token(10) == 2 * (blocks + 97 * 64) + 2 * 4 * 10 * 64
    assert engine.bytes_per_token(2, 10) == 4 * (blocks + 97 * 64) / 2 + 10 * 2 * 2 * 2 * 16 * 4
    assert load("llama").memory["weights_bytes"] >= engine.memory["weights_bytes"]
    windowed = load("mistral")
    assert windowed.operations_per_token(500) == windowed.operations_per_token(19)
    assert windowed.bytes_per_token(1, 500) == windowed.bytes_per_token(1, 19)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "the prompt is empty; give at least one token"),
        ([1] * 600, "600 tokens are more than the 511 allowed by the model's positions; shorten the prompt"),
        ([1, 97, -2], "token ids [-2, 97] are outside the vocabulary of 97"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt: list[int], says: str, load: Load) -> None:
    engine = load("llama")
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate([[1], prompt]), lambda: engine.stream(prompt), lambda: engine.add(Request(prompt)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RequestError) as caught:
            call()
        assert says in str(caught.value)
    with pytest.raises(RequestError, match=r"empty|512 allowed|outside the vocabulary"):
        engine.score(prompt)
    assert engine.idle


def test_both_mistakes_of_a_prompt_are_named(load: Load) -> None:
    with pytest.raises(RequestError) as caught:
        load("llama").add(Request([100] * 600))
    assert len(caught.value.problems) == 2


def test_a_prompt_longer_than_the_cache_is_refused(load: Load) -> None:
    with pytest.raises(RequestError, match=r"100 tokens are more than the 63 allowed by the cache \(cache_tokens"):
        load("llama", cache_tokens=64).add(Request([1] * 100))


def test_dynamic_rope_generates_up_to_the_trained_length_and_scores_beyond(load: Load) -> None:
    engine = load("llama_dynamic")
    with pytest.raises(RequestError, match="with dynamic RoPE a KV cache cannot grow beyond it"):
        engine.add(Request([1] * 64))
    assert engine.score([1] * 128).shape == (128, 97)
    with pytest.raises(RequestError, match="129 tokens are more than the 128"):
        engine.score([1] * 129)


def test_a_window_that_finds_no_pages_is_refused(load: Load) -> None:
    engine = load("llama", cache_tokens=128)
    stream = engine.stream([1] * 70)
    next(stream)
    with pytest.raises(RequestError, match="needs 1 cache pages and running requests leave 0"):
        engine.score([1, 2])


def test_bad_sizes_are_refused_together(load: Load) -> None:
    with pytest.raises(RequestError) as caught:
        load("llama", cache_tokens=0, max_batch=0, chunk=-1)
    assert caught.value.problems == ("cache_tokens: 0 is below 1", "max_batch: 0 is below 1", "chunk: -1 is below 1")


def test_other_bad_requests(load: Load) -> None:
    engine = load("llama")
    with pytest.raises(RequestError, match="2 prompts but 1 sampling parameters"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(RequestError, match=r"stop_token_ids: \[97\] are outside the vocabulary of 97"):
        engine.add(Request([1], SamplingParams(stop_token_ids=(97,))))
    with pytest.raises(
        RequestError, match="stop: llama has no tokenizer to find stop strings with; use stop_token_ids"
    ):
        engine.add(Request([1], SamplingParams(stop=("x",))))
    with pytest.raises(ModelError, match=r"tokenizer\.json is absent"):
        _ = engine.tokenizer


def test_load_takes_a_path_or_a_source_and_says_how_long_it_took(model_path: Callable[[str], Path]) -> None:
    path = model_path("llama")
    for model in (path, str(path), open_model(path)):
        engine = Engine.load(model, ops="reference", threads=1)
        assert engine.mode.name == "fp32"
        assert engine.load_seconds > 0


def test_a_number_of_threads_that_cannot_be_is_refused(model_path: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="threads must be between 1 and 1024, not 0"):
        Engine.load(model_path("llama"), threads=0)
