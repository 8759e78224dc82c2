from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import RecipeError
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.kv_smooth import fold_into_keys, key_factors, powers_of_two

F32 = np.float32
KV, HEADS, D = 2, 6, 8
NAMES = ("self_attn.q_proj", "self_attn.k_proj")


def slow(absmax: np.ndarray, alpha: float) -> np.ndarray:
    """Pair by pair, head by head."""
    found = np.ones(KV * D)
    for head in range(KV):
        raw = {}
        for i in range(D // 2):
            a, b = head * D + i, head * D + i + D // 2
            largest = float(max(absmax[a], absmax[b]))
            if largest > 0:
                raw[a] = raw[b] = largest**alpha
        mean = np.exp(np.mean(np.log(list(raw.values())))) if raw else 1.0
        for c, value in raw.items():
            found[c] = value / mean
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e4)), min_size=KV * D, max_size=KV * D), st.floats(0, 1))
def test_equals_a_slow_version(absmax: list[float], alpha: float) -> None:
    values = np.array(absmax, F32)
    assert key_factors(values, KV, alpha) == pytest.approx(slow(values, alpha), rel=1e-5)


def rope(x: np.ndarray) -> np.ndarray:
    """x [T, heads, d] turned by its position, in HF's layout."""
    angle = np.arange(len(x))[:, None] * 100.0 ** (-np.arange(D // 2) / (D // 2))
    turned = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def block(bias: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = {"q": HEADS * D, "k": KV * D}
    w = {f"self_attn.{p}_proj.weight": rng.standard_normal((n, 12)) for p, n in rows.items()}
    w["self_attn.k_proj.weight"][3] *= 40  # an outlier channel, as trained keys have
    if bias:
        w |= {f"self_attn.{p}_proj.bias": 5 * rng.standard_normal(n) for p, n in rows.items()}
    return {name: value.astype(F32) for name, value in w.items()}


def keys_and_queries(w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, k = (
        x @ w[f"self_attn.{p}_proj.weight"].T.astype(np.float64) + w.get(f"self_attn.{p}_proj.bias", 0) for p in "qk"
    )
    return rope(k.reshape(-1, KV, D)), rope(q.reshape(-1, HEADS, D))


def scores(k: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.einsum("thd,shd->hts", q, np.repeat(k, HEADS // KV, axis=1))


@pytest.mark.parametrize("bias", [False, True])
def test_scores_stay_and_the_quantized_keys_are_nearer(bias: bool) -> None:
    w, x = block(bias), np.random.default_rng(1).standard_normal((30, 12))
    k, q = keys_and_queries(w, x)
    factors = key_factors(np.abs(k).max(axis=0).ravel().astype(F32), KV)
    folded = w | fold_into_keys(w, factors, HEADS, D)
    other_k, other_q = keys_and_queries(folded, x)
    assert scores(other_k, other_q) == pytest.approx(scores(k, q), rel=1e-4, abs=1e-4)
    assert other_k == pytest.approx(k / factors.reshape(KV, D), rel=1e-4, abs=1e-5)

    def error(keys: np.ndarray, queries: np.ndarray) -> float:
        record = FORMATS["int8"]
        scale = record.scale_of(np.abs(keys).max(axis=(0, 2)).astype(F32))[:, None]
        kept = record.decode(record.encode(keys.astype(F32), scale), scale)
        return float(np.square(scores(kept, queries) - scores(k, q)).sum())

    assert error(other_k, other_q) < 0.5 * error(k, q)


def test_norms_of_queries_and_keys_carry_one_set_of_factors() -> None:
    w = {"self_attn.k_norm.weight": np.full(D, 2, F32), "self_attn.q_norm.weight": np.full(D, 3, F32)}
    absmax = np.random.default_rng(0).uniform(1, 50, KV * D).astype(F32)
    factors = powers_of_two(key_factors(absmax, KV, shared=True))
    assert np.array_equal(factors[:D], factors[D:])
    folded = fold_into_keys(w, factors, HEADS, D)
    assert set(folded) == set(w)
    assert np.array_equal(folded["self_attn.k_norm.weight"] * folded["self_attn.q_norm.weight"], np.full(D, 6, F32))


def test_dull_keys() -> None:
    assert np.array_equal(key_factors(np.zeros(KV * D, F32), KV), np.ones(KV * D, F32))
    outlier = np.ones(KV * D, F32)
    outlier[2] = 1e4
    factors = key_factors(outlier, KV)
    assert factors[2] == factors[6] == pytest.approx(1e4 * factors[0], rel=1e-5)
    assert np.array_equal(key_factors(outlier, KV, alpha=0.0), np.ones(KV * D, F32))
    assert np.array_equal(powers_of_two(np.array([0.7, 1.4, 1.5, 3.0], F32)), [0.5, 1, 2, 4])


def test_alpha_is_a_share() -> None:
    with pytest.raises(RecipeError, match=r"kv_smooth.alpha is 1.5; it is between 0 \(K stays as it is\) and 1"):
        key_factors(np.ones(KV * D, F32), KV, 1.5)
