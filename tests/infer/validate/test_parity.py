from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.infer.engine import Engine, Tap
from quantbench.infer.validate.parity import IDENTICAL_DB, Parity, compare, compare_codes, departs, sqnr_db
from quantbench.quantizers.activation import quantize_activation

IDS = [(7 * i) % 251 for i in range(40)]


@pytest.fixture(scope="module")
def traces(tiny_model):
    """Float and a8w8 trace of the real engine; a8w8 stands for both the simulated and the served run."""
    return [Engine.load(tiny_model, mode, ops="reference").trace(IDS) for mode in ("fp32", "a8w8")]


@dataclass
class Edited:
    """A trace of which some parts are replaced."""

    hidden: list
    taps: dict
    logits: np.ndarray = field(repr=False)


def edited(trace, **changes):
    return Edited(**({"hidden": list(trace.hidden), "taps": dict(trace.taps), "logits": trace.logits} | changes))


def test_a_served_run_that_is_the_simulated_one(traces):
    base, served = traces
    result = compare([(base, served, served)])
    assert result["codes_compared"] == 3 * len(IDS) * (64 + 64 + 64 + 128)
    assert (result["codes_different"], result["scales_different"]) == (0, 0)
    assert (result["top1_served_simulated"], result["kl_served_simulated"]) == (1.0, 0.0)
    assert result["first_departure"] is None
    assert [row["name"] for row in result["layers"]] == [f"model.layers.{i}" for i in range(3)]
    for row in result["layers"]:
        assert row["sqnr_served_to_simulated_db"] == IDENTICAL_DB
        assert row["sqnr_simulated_db"] == row["sqnr_served_db"]
        assert 10 < row["sqnr_served_db"] < 70


def test_sqnr_is_that_of_all_windows_together(traces):
    base, served = traces
    result = compare([(base, served, served), (served, served, served)])
    signal = sum(np.square(t.hidden[1].astype(np.float64)).sum() for t in (base, served))
    noise = np.square(base.hidden[1].astype(np.float64) - served.hidden[1]).sum()
    assert result["layers"][1]["sqnr_served_db"] == pytest.approx(10 * np.log10(signal / noise))


def test_one_flipped_code_names_its_tap(traces):
    base, served = traces
    name = "model.layers.1.mlp_in"
    codes = served.taps[name].codes.copy()
    codes[3, 5] ^= 1
    broken = edited(served, taps=served.taps | {name: replace(served.taps[name], codes=codes)})
    result = compare([(base, served, broken)])
    assert result["codes_different"] == 1
    assert result["first_departure"] == {
        "layer": "model.layers.1",
        "why": f"{name}: 1 of {codes.size} codes and 0 scales differ from the numpy reference on the same input: "
        "the kernel breaks the specification",
    }


def test_a_wrong_scale_is_told_even_where_the_codes_are_right(traces):
    base, served = traces
    name = "model.layers.0.o_in"
    scale = np.nextafter(served.taps[name].scale, np.float32(9))
    broken = edited(served, taps=served.taps | {name: replace(served.taps[name], scale=scale)})
    result = compare([(base, served, broken)])
    assert (result["codes_different"], result["scales_different"]) == (0, len(IDS))
    assert result["first_departure"]["layer"] == "model.layers.0"


def noisy(x, seed=0, size=0.5):
    noise = np.random.default_rng(seed).normal(scale=size * x.std(), size=x.shape)
    return (x + noise).astype(np.float32)


def test_a_departing_stream_names_the_layer_and_the_first_tap(traces):
    base, served = traces
    hidden = [h if i < 1 else noisy(h) for i, h in enumerate(served.hidden)]
    taps = {}
    for name, tap in served.taps.items():
        later = name.startswith(("model.layers.1.down_in", "model.layers.2"))
        values = noisy(tap.values) if later else tap.values
        codes, scale = quantize_activation(values, "int8", None) if tap.codes is not None else (None, None)
        taps[name] = Tap(values, codes, scale)
    departure = compare([(base, served, edited(served, hidden=hidden, taps=taps))])["first_departure"]
    assert departure["layer"] == "model.layers.1"
    assert "model.layers.1.down_in is the first input to differ" in departure["why"]
    assert "model.layers.1.mlp_in still agreed to 200.0 dB" in departure["why"]


def test_a_first_tap_that_departs_tells_of_the_layer_before(traces):
    base, served = traces
    name = "model.layers.0.attn_in"
    values = noisy(served.taps[name].values)
    tap = Tap(values, *quantize_activation(values, "int8", None))
    broken = edited(served, hidden=[noisy(h) for h in served.hidden], taps=served.taps | {name: tap})
    why = compare([(base, served, broken)])["first_departure"]["why"]
    assert f"{name} is the first input to differ" in why
    assert "its input agreed to 200.0 dB" in why


def test_a_departure_behind_the_last_tap_and_one_without_taps(traces):
    base, served = traces
    broken = edited(served, hidden=[noisy(h) for h in served.hidden])
    behind = compare([(base, served, broken)])["first_departure"]["why"]
    assert behind.endswith("all inputs of its linears agree, so the last linear or the residual sum differs")
    untapped = compare([(base, edited(served, taps={}), broken)])["first_departure"]["why"]
    assert untapped.endswith("its input agreed to 200.0 dB; the codes match the reference on the input that was served")


def test_logits_alone_decide_top1_and_kl(traces):
    base, served = traces
    shifted = edited(served, logits=np.roll(served.logits, 1, axis=1))
    parity = Parity()
    parity.add(base, served, served)
    parity.add(base, served, shifted)
    result = parity.result()
    assert parity.tokens == 2 * len(IDS)
    assert result["top1_served_simulated"] == pytest.approx(0.5, abs=0.05)
    assert result["kl_served_simulated"] > 0.1


@given(st.integers(0, 2**32 - 1), st.sampled_from(["int8", "fp8_e4m3"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_codes_of_the_reference_are_found_equal_and_a_changed_byte_is_not(seed, form, static):
    x = np.random.default_rng(seed).normal(size=(5, 16)).astype(np.float32)
    codes, scale = quantize_activation(x, form, 0.02 if static else None)
    assert compare_codes(x, codes, scale) == (0, 0)
    broken = codes.copy()
    broken.view(np.uint8)[4, 15] ^= 1
    assert compare_codes(x, broken, scale) == (1, 0)


def test_sqnr_at_its_ends():
    assert sqnr_db(1.0, 0.0) == IDENTICAL_DB
    assert sqnr_db(0.0, 1.0) == -IDENTICAL_DB
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)


def test_streams_depart_when_their_difference_is_not_small_against_the_noise():
    assert not departs(45, simulated=30)
    assert departs(35, simulated=30)
    assert not departs(61, simulated=110)
    assert departs(59, simulated=110)
