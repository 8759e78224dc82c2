"""Sampling and log-probabilities on the GPU against numpy and against infer/engine/sampling.py."""

from __future__ import annotations

import numpy as np
import pytest

from quantbench.infer.cuda import sample
from quantbench.infer.cuda.device import Device
from quantbench.infer.engine.sampling import SamplingParams, distribution

SIZES = [(1, 1), (3, 100), (2, 1023), (5, 49152), (2, 128256)]


def logits_of(rows: int, vocabulary: int) -> np.ndarray:
    return (np.random.default_rng(vocabulary).standard_normal((rows, vocabulary)) * 3).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_argmax_takes_the_lowest_of_equal_ones(device: Device, size: tuple[int, int]) -> None:
    logits = np.round(logits_of(*size))
    np.testing.assert_array_equal(device.fetch(sample.argmax(device, device.upload(logits))), logits.argmax(axis=1))
    logits[:] = -5
    np.testing.assert_array_equal(device.fetch(sample.argmax(device, device.upload(logits))), 0)
    assert device.fetch(device.bad)[0] == 0


@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
def test_logits_that_are_no_numbers_are_reported(device: Device, poison: float) -> None:
    logits = logits_of(2, 1000)
    logits[1, 999] = poison
    sample.argmax(device, device.upload(logits))
    assert device.fetch(device.bad)[0] == 2


def test_a_row_without_a_finite_logit_is_reported(device: Device) -> None:
    logits = device.upload(np.full((1, 70), -np.inf, np.float32))
    sample.argmax(device, logits)
    assert device.fetch(device.bad)[0] == 2
    device.fill(device.bad, 0)
    sample.logprobs(device, logits, device.upload(np.zeros(1, np.int32)))
    assert device.fetch(device.bad)[0] == 2


@pytest.mark.parametrize("size", SIZES)
def test_logprobs(device: Device, size: tuple[int, int]) -> None:
    logits = logits_of(*size) * 5
    targets = np.random.default_rng(0).integers(0, size[1], size[0]).astype(np.int32)
    got = device.fetch(sample.logprobs(device, device.upload(logits), device.upload(targets)))
    exact = logits.astype(np.float64)
    top = exact.max(axis=1)
    want = exact[np.arange(size[0]), targets] - top - np.log(np.exp(exact - top[:, None]).sum(axis=1))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [100, 49152])
@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=0.0), SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.9), SamplingParams(temperature=1.0, top_k=40, top_p=0.5),
        SamplingParams(temperature=1.0, top_k=1),
    ],
    ids=str,
)  # fmt: skip
def test_draws_as_the_host_does(device: Device, vocabulary: int, p: SamplingParams) -> None:
    """Where the host's running mass meets the uniform number almost exactly, its neighbour is right too."""
    rows = 64
    logits, uniform = logits_of(rows, vocabulary), np.random.default_rng(1).random(rows).astype(np.float32)
    uniform[0] = 0
    logits[1, ::7] = logits[1, 0]  # equal weights
    full = lambda value, dtype: device.upload(np.full(rows, value, dtype))  # noqa: E731
    got = device.fetch(
        sample.sample(
            device, device.upload(logits), full(p.temperature, np.float32), full(p.top_k or 0, np.int32),
            full(p.top_p, np.float32), device.upload(uniform),
        )
    )  # fmt: skip
    for row in range(rows):
        if p.temperature == 0:
            assert got[row] == logits[row].argmax()
            continue
        ids, probabilities = distribution(logits[row], p)
        place = np.nonzero(ids == got[row])[0]
        assert len(place) == 1, f"row {row}: token {got[row]} is not a candidate"
        before = probabilities[: place[0]].sum()
        assert before - 1e-5 <= uniform[row] <= before + probabilities[place[0]] + 1e-5, f"row {row}"
