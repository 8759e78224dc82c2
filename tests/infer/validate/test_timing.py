import pytest

from quantbench.errors import RequestError
from quantbench.infer.engine import Engine
from quantbench.infer.validate.timing import Load, time_engine

LOAD = Load(prompt=20, output=5, batches=(1, 3))


def test_every_batch_is_timed_step_by_step(tiny_model):
    engine = Engine.load(tiny_model, "a8w8", ops="reference", **LOAD.engine_options())
    times = time_engine(engine, LOAD)
    assert engine.idle
    assert len(times.prefill) == 3
    assert min(times.prefill) > 0
    assert list(times.decode) == [1, 3]
    for batch, decode in times.decode.items():
        assert len(decode.steps) == LOAD.output - 1
        assert len(decode.first_token) == batch
        assert min(decode.steps) > 0
        assert decode.cpu_s > 0
    assert times.decode[3].work.operations == pytest.approx(3 * times.decode[1].work.operations)
    assert times.decode[3].work.weight_bytes == times.decode[1].work.weight_bytes


def test_a_prefill_of_several_steps_leaves_full_batches_to_decode(tiny_model):
    load = Load(prompt=200, output=4, batches=(8,))  # 1600 prompt tokens: four steps of 512
    engine = Engine.load(tiny_model, "fp32", ops="reference", **load.engine_options())
    seen = []
    step = engine.step
    engine.step = lambda: seen.append(outputs := step()) or outputs
    decode = time_engine(engine, load).decode[8]
    assert len(decode.steps) == 3
    assert [len(o) for o in seen[-3:]] == [8, 8, 8]
    assert sorted(decode.first_token) == decode.first_token
    assert decode.first_token[0] < decode.first_token[-1]


def test_prompts_are_not_reused_between_measurements():
    assert LOAD.engine_options() == {"max_batch": 3, "cache_tokens": 192, "chunk": 512, "prefix_reuse": False}


def test_a_load_that_makes_no_sense_lists_every_problem():
    with pytest.raises(RequestError) as error:
        Load(prompt=0, output=1, batches=())
    assert error.value.problems == (
        "prompt: 0 tokens; a prompt has at least 1",
        "output: 1 tokens; the time between tokens needs at least 2",
        "batches: []; give at least one batch of 1 sequence or more",
    )
    with pytest.raises(RequestError, match=r"batches: \[1, 0\]"):
        Load(batches=(1, 0))


def test_a_load_beyond_the_models_positions(tiny_model):
    load = Load(prompt=250, output=10, batches=(1,))
    engine = Engine.load(tiny_model, "fp32", ops="reference", **load.engine_options())
    with pytest.raises(RequestError, match=r"prompt 250 and output 10 need 264 positions at these batches, .* has 256"):
        time_engine(engine, load)
