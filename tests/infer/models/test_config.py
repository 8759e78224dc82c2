"""Rotary frequencies against slow, literal versions of their papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantbench.infer.models import FAMILIES, Rope
from quantbench.infer.models.config import tokens_of

LLAMA3 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
BASE = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("d", [2, 64, 128])
def test_default(d):
    expected = [10000.0 ** (-2 * i / d) for i in range(d // 2)]
    found = Rope().inverse_frequencies(d, 100)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-6)


def test_linear():
    rope = Rope(kind="linear", factor=4.0)
    assert rope.inverse_frequencies(64, 9) == pytest.approx(Rope().inverse_frequencies(64, 9) / 4)


def test_dynamic_grows_beyond_the_trained_length():
    rope = Rope(kind="dynamic", factor=2.0, original_max_positions=512)
    assert np.array_equal(rope.inverse_frequencies(64, 512), Rope().inverse_frequencies(64, 512))
    theta = 10000.0 * (2 * 1024 / 512 - 1) ** (64 / 62)
    assert rope.inverse_frequencies(64, 1024) == pytest.approx(Rope(theta).inverse_frequencies(64, 0), rel=1e-6)


def test_llama3():
    for plain, scaled in zip(
        Rope(500000.0).inverse_frequencies(128, 0).tolist(), LLAMA3.inverse_frequencies(128, 0).tolist(), strict=True
    ):
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192 / 1:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert scaled == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings(key):
    values = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    assert FAMILIES["llama"].read_config(BASE | {key: values}).rope == LLAMA3


def test_token_ids():
    assert (tokens_of(None), tokens_of(3), tokens_of([1, 2])) == ((), (3,), (1, 2))
