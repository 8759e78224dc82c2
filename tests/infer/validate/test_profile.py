import time

import pytest

from quantbench.infer.engine import Engine, Request, SamplingParams
from quantbench.infer.validate.profile import KINDS, OUTSIDE, profile_steps


@pytest.fixture
def engine(tiny_model):
    engine = Engine.load(tiny_model, "a8w8", ops="reference")
    engine.add(Request(list(range(1, 30)), SamplingParams(max_tokens=50, ignore_eos=True)))
    engine.step()
    return engine


def test_the_kinds_of_a_step_sum_to_the_step(engine):
    start = time.perf_counter()
    profile = profile_steps(engine, 4)
    wall = (time.perf_counter() - start) / 4
    assert set(profile) == {*KINDS.values(), "linears", "output head", OUTSIDE}
    assert min(profile.values()) > 0
    assert 0.5 * wall < sum(profile.values()) <= wall


def test_time_is_put_to_the_operation_that_took_it(engine):
    attention = engine.runner.ops.attention

    def slow(*arguments, **options):
        time.sleep(0.01)
        return attention(*arguments, **options)

    engine.runner.ops.attention = slow
    profile = profile_steps(engine, 2)
    assert profile["attention"] > 3 * 0.01  # three layers
    assert max(profile, key=profile.get) == "attention"


def test_the_engine_goes_on_as_before(engine, tiny_model):
    ops = engine.runner.ops
    profile_steps(engine, 2)
    assert engine.runner.ops is ops
    plain = Engine.load(tiny_model, "a8w8", ops="reference")
    assert plain.generate([[1, 2]], SamplingParams(max_tokens=4))[0].ids == (
        engine.generate([[1, 2]], SamplingParams(max_tokens=4))[0].ids
    )
