from __future__ import annotations

import numpy as np

from quantbench.calibrate.hidden import HiddenStates
from quantbench.calibrate.sample import ROWS, SEQUENCES, TapSample
from tests.calibrate.conftest import Decoder


def test_rows_are_those_of_the_taps_evenly_spaced(decoder: Decoder) -> None:
    forward = decoder.forward()
    ids = np.random.default_rng(0).integers(0, 97, (SEQUENCES + 3, 160)).astype(np.int32)
    hidden = HiddenStates.start(forward.embed(ids), np.full(len(ids), 160, np.int32))
    seen: dict[str, np.ndarray] = {}
    forward.load(0, decoder.block(0))
    few = slice(0, SEQUENCES)
    forward.run(hidden.read(few), hidden.lengths[few], lambda tap, x: seen.__setitem__(tap, x.copy()))
    sample = TapSample(forward, 0, decoder.block(0), hidden)
    rows = sample(["down_in"])
    assert len(rows["down_in"]) == 8 * 160 // 3 + 1 <= ROWS
    assert np.array_equal(rows["down_in"], seen["down_in"][::3])
    assert sample(["attn_in", "down_in"])["down_in"] is rows["down_in"]  # run once
    assert np.array_equal(sample(["attn_in"])["attn_in"], seen["attn_in"][::3])
