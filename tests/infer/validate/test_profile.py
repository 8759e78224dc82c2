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


def test_the_kinds_of_a_step_sum_to_the_step(engine, monkeypatch):
    step, within = engine.step, []

    def timed():
        start = time.perf_counter()
        step()
        within.append(time.perf_counter() - start)

    monkeypatch.setattr(engine, "step", timed)
    start = time.perf_counter()
    profile, operations = profile_steps(engine, 4)
    wall = time.perf_counter() - start
    assert set(profile) == {*KINDS.values(), OUTSIDE}
    assert operations == {}  # numpy: only times are known
    assert min(profile.values()) > 0
    assert len(within) == 4
    assert sum(within) <= 4 * sum(profile.values()) * (1 + 1e-9) <= wall * (1 + 2e-9)


def test_time_is_put_to_the_operation_that_took_it(engine):
    attention = engine.runner.ops.attention

    def slow(*arguments, **options):
        time.sleep(0.01)
        return attention(*arguments, **options)

    engine.runner.ops.attention = slow
    profile, _ = profile_steps(engine, 2)
    assert profile["attention"] > 3 * 0.01  # three layers; other kinds may be held up by other processes


def test_the_engine_goes_on_as_before(engine, tiny_model):
    ops = engine.runner.ops
    profile_steps(engine, 2)
    assert engine.runner.ops is ops
    plain = Engine.load(tiny_model, "a8w8", ops="reference")
    assert plain.generate([[1, 2]], SamplingParams(max_tokens=4))[0].ids == (
        engine.generate([[1, 2]], SamplingParams(max_tokens=4))[0].ids
    )


def test_a_native_step_counts_time_bytes_and_operations(tiny_model):
    engine = Engine.load(tiny_model, "a8w8")
    engine.add(Request(list(range(1, 30)), SamplingParams(max_tokens=50, ignore_eos=True)))
    engine.step()
    start = time.perf_counter()
    profile, spent = profile_steps(engine, 4)
    wall = (time.perf_counter() - start) / 4
    assert set(spent) == {"embed", "add_norm", "qkv", "attention", "o", "gate_up", "silu_mul", "down", "head"}
    assert sum(profile.values()) <= wall
    assert sum(s.seconds for s in spent.values()) == pytest.approx(sum(profile.values()) - profile[OUTSIDE])
    assert spent["gate_up"].operations == 3 * 2 * 64 * 256  # three layers, one token
    assert spent["gate_up"].bytes == sum(p.nbytes for layer in engine.runner.model.layers for p in layer.gate_up.packed)
    assert spent["head"].operations == 2 * 64 * 256
    row = spent["head"].json(wall)
    assert row["gop_per_s"] == pytest.approx(2 * 64 * 256 / spent["head"].seconds / 1e9)
    assert 0 < row["share"] < 1
    engine.step()
    assert engine.runner.profile(False) == {}  # counting has ended
