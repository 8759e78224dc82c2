from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError
from quantbench.quantizers.shift import fold_shift, head_shift

F32 = np.float32
KV, HEADS, D, OUT = 2, 6, 4, 10


def rows(seed: int = 0, tokens: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, HEADS * D)) + np.repeat(np.arange(KV) + 1, HEADS // KV * D)).astype(F32)


def slow(x: np.ndarray, midrange: bool) -> np.ndarray:
    found = np.empty(KV * D)
    for kv in range(KV):
        for c in range(D):
            columns = [x[:, h * D + c].astype(np.float64) for h in range(HEADS) if h // (HEADS // KV) == kv]
            low, high = min(v.min() for v in columns), max(v.max() for v in columns)
            found[kv * D + c] = (low + high) / 2 if midrange else np.mean([v.mean() for v in columns])
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_equals_a_slow_version(seed: int, midrange: bool) -> None:
    x = rows(seed)
    assert head_shift(x, KV, D, midrange) == pytest.approx(slow(x, midrange), rel=1e-5, abs=1e-6)


def test_a_giant_row_does_not_decide_the_mean() -> None:
    x = rows(1)
    x[0] = 1e4
    assert head_shift(x, KV, D) == pytest.approx(head_shift(x[1:], KV, D), abs=0.2)
    assert head_shift(x, KV, D, midrange=True).min() > 4e3


def test_values_moved_by_a_constant_move_a_mean_of_them_by_it() -> None:
    """o_proj(P (V - s)) + W s == o_proj(P V) for every row of weights that add up to 1."""
    rng = np.random.default_rng(2)
    w = {
        "self_attn.v_proj.weight": rng.standard_normal((KV * D, 8)).astype(F32),
        "self_attn.o_proj.weight": rng.standard_normal((OUT, HEADS * D)).astype(F32),
        "self_attn.o_proj.bias": rng.standard_normal(OUT).astype(F32),
    }
    x, shares = rng.standard_normal((5, 8)), rng.dirichlet(np.ones(5), (HEADS, 5))

    def block(weights: dict[str, np.ndarray]) -> np.ndarray:
        v = x @ weights["self_attn.v_proj.weight"].T + weights.get("self_attn.v_proj.bias", 0)
        v = np.repeat(v.reshape(5, KV, D), HEADS // KV, axis=1)
        o = np.einsum("hts,shd->thd", shares, v).reshape(5, -1)
        return o @ weights["self_attn.o_proj.weight"].T + weights["self_attn.o_proj.bias"]

    folded = w | fold_shift(w, rng.standard_normal(KV * D).astype(F32), HEADS, D)
    assert block(folded) == pytest.approx(block(w), abs=1e-5)
    assert folded["self_attn.v_proj.bias"].any()


def test_dull_rows() -> None:
    assert not head_shift(np.zeros((4, HEADS * D), F32), KV, D).any()
    assert not head_shift(np.zeros((4, HEADS * D), F32), KV, D, midrange=True).any()
    broken = rows()
    broken[3, 4] = np.nan
    with pytest.raises(CalibrationError, match="shift: the rows of o_in: 1 of 1440 values are NaN"):
        head_shift(broken, KV, D)
