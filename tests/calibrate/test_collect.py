from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.calibrate.collect import Collect, advance_block, collect_block, tempered
from quantbench.calibrate.forward import ALL_TAPS
from quantbench.calibrate.hidden import HiddenStates
from quantbench.errors import CalibrationError
from quantbench.scales.statistics import Statistics, merge, observe

from .conftest import Decoder, reference_block, tiny_config

DECODER = Decoder(tiny_config())
FORWARD = DECODER.forward()


def hidden_of(samples: np.ndarray, lengths: list[int] | None = None) -> HiddenStates:
    full = [samples.shape[1]] * len(samples)
    return HiddenStates.start(samples, np.array(lengths or full, np.int32))


def random_states(samples: int = 4, length: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, length, 48)).astype(np.float32)


def assert_same(a: Statistics, b: Statistics, exact_sums: bool = True) -> None:
    for field in fields(Statistics):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("channel_sum", "hessian") and not exact_sums and left is not None:
            np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)
        else:
            np.testing.assert_equal(left, right, err_msg=field.name)


def test_statistics_are_of_what_the_plain_forward_sees() -> None:
    states = random_states()
    seen, after = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states), Collect(hessian=("o_in",)))
    results = [reference_block(DECODER.config, 0, DECODER.block(0), x) for x in states]
    assert list(seen) == ["attn_in", "k", "v", "o_in", "mlp_in", "down_in"]
    for tap, statistics in seen.items():
        x = np.concatenate([taps[tap] for _, taps in results])
        flat = x.reshape(len(x), -1)
        assert statistics.tokens == 36
        assert statistics.rows == (2 if tap in ("k", "v") else 1)
        np.testing.assert_allclose(statistics.channel_absmax, np.abs(flat).max(0), rtol=1e-3)
        np.testing.assert_allclose(statistics.channel_sum, flat.sum(0), rtol=1e-3, atol=1e-3)
        assert statistics.histogram is not None
        assert statistics.histogram.sum() == x.size
        if tap == "o_in":
            assert statistics.hessian is not None
            np.testing.assert_allclose(statistics.hessian, flat.T @ flat, rtol=1e-3, atol=1e-3)
        else:
            assert statistics.hessian is None
    np.testing.assert_allclose(after.read(slice(0, 4)), [out for out, _ in results], rtol=1e-3, atol=1e-4)
    assert after.layer == 1


@settings(max_examples=12, deadline=None)
@given(split=st.integers(1, 5), batch=st.integers(1, 3), seed=st.integers(0, 100))
def test_two_halves_merged_are_one_pass(split: int, batch: int, seed: int) -> None:
    states = random_states(6, seed=seed)
    split -= split % batch  # whole batches on both sides: then the batches are the same ones
    options = Collect(batch=batch, hessian=("attn_in",))
    whole, _ = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states), options)
    parts = [s for s in (states[:split], states[split:]) if len(s)]
    halves = [collect_block(FORWARD, 0, DECODER.block(0), hidden_of(s), options)[0] for s in parts]
    for tap in ALL_TAPS:
        joined = halves[0][tap] if len(halves) == 1 else merge(halves[0][tap], halves[1][tap])
        assert_same(whole[tap], joined, exact_sums=False)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=3), seed=st.integers(0, 100))
def test_padding_is_never_counted(lengths: list[int], seed: int) -> None:
    states = random_states(3, seed=seed)
    for sample, length in zip(states, lengths, strict=True):
        sample[length:] = 1e6
    seen, after = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states, lengths), Collect(batch=1))
    alone = [
        collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states[i : i + 1, :n]))[0] for i, n in enumerate(lengths)
    ]
    for tap in ALL_TAPS:
        assert seen[tap].tokens == sum(lengths)
        expected = [s[tap] for s in alone]
        np.testing.assert_allclose(seen[tap].absmax, np.max([s.absmax for s in expected], axis=0), rtol=1e-5)
        np.testing.assert_allclose(seen[tap].channel_sum, sum(s.channel_sum for s in expected), rtol=1e-4, atol=1e-4)
    for sample, length in enumerate(lengths):
        assert not after.read(slice(sample, sample + 1))[0, length:].any()


def test_a_run_repeated_gives_the_same_bits(tmp_path: Path) -> None:
    states = random_states(8, 64)
    first, after = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states), Collect(batch=2))
    for offset in (1, 3):  # numpy arrays at another alignment
        raw = (
            np.empty(states.nbytes + 64, np.uint8)[offset * 4 :][: states.nbytes].view(np.float32).reshape(states.shape)
        )
        raw[:] = states
        again, after_again = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(raw), Collect(batch=2))
        for tap in ALL_TAPS:
            assert_same(first[tap], again[tap])
        np.testing.assert_array_equal(after.read(slice(0, 8)), after_again.read(slice(0, 8)))


def test_spilled_states_give_the_same_bits_as_those_in_memory(tmp_path: Path) -> None:
    states = random_states()
    spilled = HiddenStates.start(states, np.full(4, 9, np.int32), tmp_path, limit_bytes=0)
    a, after_a = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(states), Collect(batch=3))
    b, after_b = collect_block(FORWARD, 0, DECODER.block(0), spilled, Collect(batch=3))
    after_b.commit()
    for tap in ALL_TAPS:
        assert_same(a[tap], b[tap])
    np.testing.assert_array_equal(after_a.read(slice(0, 4)), after_b.read(slice(0, 4)))


def test_factors_scale_what_is_observed_and_nothing_else() -> None:
    factors = {"attn_in": np.linspace(0.5, 2, 48).astype(np.float32)}
    options = Collect(taps=("attn_in", "o_in"))
    plain, after = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(random_states()), options)
    options = Collect(taps=("attn_in", "o_in"), factors=factors)
    scaled, after_scaled = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(random_states()), options)
    assert set(plain) == {"attn_in", "o_in"}
    np.testing.assert_array_equal(
        scaled["attn_in"].channel_absmax, plain["attn_in"].channel_absmax * factors["attn_in"]
    )
    assert_same(plain["o_in"], scaled["o_in"])
    np.testing.assert_array_equal(after.read(slice(0, 4)), after_scaled.read(slice(0, 4)))


def test_a_replaced_tap_is_observed_before_it_is_replaced() -> None:
    hidden = hidden_of(random_states())
    plain, after = collect_block(FORWARD, 0, DECODER.block(0), hidden)
    seen, changed = collect_block(
        FORWARD, 0, DECODER.block(0), hidden, replace=lambda tap, x: x * 0 if tap == "down_in" else None
    )
    assert_same(plain["down_in"], seen["down_in"])
    moved = advance_block(
        FORWARD, 0, DECODER.block(0), hidden, replace=lambda tap, x: x * 0 if tap == "down_in" else None
    )
    np.testing.assert_array_equal(changed.read(slice(0, 4)), moved.read(slice(0, 4)))
    assert np.abs(changed.read(slice(0, 4)) - after.read(slice(0, 4))).max() > 0.1


def test_a_second_look_leaves_the_states_where_they_are() -> None:
    hidden = hidden_of(random_states())
    _, same = collect_block(FORWARD, 0, DECODER.block(0), hidden, advance=False)
    assert same is hidden


def test_live_observers_see_the_batches_in_order() -> None:
    options = Collect(taps=("o_in", "k"), observers=("paddleslim:absmax", "paddleslim:avg"), batch=1)
    seen, _ = collect_block(FORWARD, 0, DECODER.block(0), hidden_of(random_states()), options)
    for tap in ("o_in", "k"):
        statistics = seen[tap]
        np.testing.assert_array_equal(statistics.live["paddleslim:absmax"], statistics.absmax)
        np.testing.assert_allclose(statistics.live["paddleslim:avg"], statistics.batch_absmax.mean(0), rtol=1e-6)


def test_nan_in_weights_names_every_damaged_tensor() -> None:
    weights = DECODER.block(1)
    weights["mlp.up_proj.weight"][3, 4] = np.nan
    weights["self_attn.q_proj.weight"][0, :2] = np.inf
    with pytest.raises(CalibrationError) as error:
        collect_block(FORWARD, 1, weights, hidden_of(random_states()))
    assert error.value.problems == (
        "model.layers.1.mlp.up_proj.weight: 1 of 3840 weights are NaN or Inf; the model file is damaged",
        "model.layers.1.self_attn.q_proj.weight: 2 of 2304 weights are NaN or Inf; the model file is damaged",
    )


def test_an_activation_that_overflows_names_block_and_tap() -> None:
    weights = DECODER.block(1)
    weights["mlp.gate_proj.weight"] *= np.float32(1e20)
    weights["mlp.up_proj.weight"] *= np.float32(1e20)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.1 down_in: an activation is NaN or Inf"):
        collect_block(FORWARD, 1, weights, hidden_of(random_states()))


def test_opposite_infinities_do_not_cancel() -> None:
    weights = DECODER.block(1)
    weights["mlp.up_proj.weight"][0, :2] = np.inf, -np.inf
    with pytest.raises(CalibrationError, match="2 of 3840"):
        collect_block(FORWARD, 1, weights, hidden_of(random_states()))


def test_observing_a_batch_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    taps: dict[str, np.ndarray] = {}
    hidden = hidden_of(random_states())
    seen, _ = collect_block(FORWARD, 0, DECODER.block(0), hidden, Collect(hessian=("attn_in",)))
    FORWARD.run(hidden.read(slice(0, 4)), hidden.lengths, lambda tap, x: taps.update({tap: x.copy()}))
    for tap, x in taps.items():
        expected = observe(x.reshape(len(x), -1), 2 if tap in ("k", "v") else 1, tap == "attn_in")
        assert_same(seen[tap], expected)


def test_one_giant_token_does_not_decide_the_hessian() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 16)).astype(np.float32)
    assert tempered(x) is x
    assert not tempered(np.zeros((3, 4), np.float32)).any()
    x[7] *= 1e4
    norms = np.linalg.norm(tempered(x), axis=1)
    assert norms.max() == pytest.approx(4 * np.median(np.linalg.norm(x, axis=1)), rel=1e-5)
    others = np.arange(200) != 7
    assert np.array_equal(tempered(x)[others], x[others])
    assert tempered(x)[7] / norms[7] == pytest.approx(x[7] / np.linalg.norm(x[7]), rel=1e-5)
