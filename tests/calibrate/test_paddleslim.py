"""Ours and PaddleSlim's observers agree wherever PaddleSlim is right; its traps are shown to be there and avoided."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from quantbench.calibrate import paddleslim
from quantbench.calibrate.paddleslim import LIVE, live_observer
from quantbench.errors import CalibrationError, DependencyError
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.ranges import RANGES, percentile
from quantbench.scales.statistics import Statistics, merge, observe

NAMES = ["paddleslim:absmax", "paddleslim:avg", "paddleslim:emd", "paddleslim:hist", "paddleslim:kl", "paddleslim:mse"]


def batches(seed: int = 0, count: int = 3) -> list[np.ndarray]:
    """Heavy-tailed values whose batches differ in size of values, as a real tap's do."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_t(4, (256, 32)) * (1 + i)).astype(np.float32) for i in range(count)]


def threshold(name: str, data: list[np.ndarray], rows: int = 1) -> np.ndarray:
    observer = live_observer(name, rows)
    for x in data:
        observer.update(x)
    return observer.threshold()


def statistics(data: list[np.ndarray], rows: int = 1) -> Statistics:
    merged = observe(data[0], rows)
    for x in data[1:]:
        merged = merge(merged, observe(x, rows))
    return merged


def squared_error(data: list[np.ndarray], absmax: float) -> float:
    x, record = np.concatenate(data), FORMATS["int8"]
    scale = record.scale_of(np.array([absmax], np.float32))
    return float(((record.decode(record.encode(x, scale), scale) - x).astype(np.float64) ** 2).mean())


def test_the_names_a_recipe_may_use() -> None:
    assert sorted(LIVE) == NAMES


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_absmax_and_avg_are_equal(rows: int, seed: int) -> None:
    data = batches(seed)
    seen = statistics(data, rows)
    np.testing.assert_array_equal(threshold("paddleslim:absmax", data, rows), RANGES["absmax"](seen, 127))
    np.testing.assert_allclose(threshold("paddleslim:avg", data, rows), RANGES["avg"](seen, 127), rtol=3e-7)


@pytest.mark.parametrize("seed", range(3))
def test_hist_is_our_percentile(seed: int) -> None:
    data = [np.abs(x) for x in batches(seed)]  # one-sided: PaddleSlim's fraction is of each side
    theirs = threshold("paddleslim:hist", data)[0]
    values = np.concatenate(data)
    assert abs(theirs - percentile(statistics(data), 127, 0.999)[0]) < 3 * values.max() / 2048
    assert np.mean(values <= theirs) == pytest.approx(0.999, abs=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_mse_is_as_good_as_ours(seed: int) -> None:
    data = batches(seed)
    theirs, ours = threshold("paddleslim:mse", data)[0], RANGES["mse"](statistics(data), 127)[0]
    assert squared_error(data, float(ours)) <= squared_error(data, float(theirs)) * 1.02
    assert squared_error(data, float(theirs)) <= squared_error(data, float(ours)) * 1.05


@pytest.mark.parametrize("seed", range(2))
def test_kl_clips_about_as_much_as_ours(seed: int) -> None:
    data = batches(seed)
    theirs, ours = threshold("paddleslim:kl", data)[0], RANGES["kl"](statistics(data), 127)[0]
    assert 0.4 < ours / theirs < 2.5
    assert theirs < np.concatenate(data).max() * 1.001


@pytest.mark.parametrize("name", ["paddleslim:mse", "paddleslim:emd"])
def test_the_last_batch_does_not_decide_alone(name: str) -> None:
    data = batches()
    whole = threshold(name, [np.concatenate(data)])
    np.testing.assert_array_equal(threshold(name, data), whole)
    np.testing.assert_array_equal(threshold(name, data[::-1]), threshold(name, [np.concatenate(data[::-1])]))
    assert threshold(name, data[::-1])[0] == pytest.approx(whole[0], rel=0.05)
    raw = paddleslim._create({"paddleslim:mse": "MSEObserver", "paddleslim:emd": "EMDObserver"}[name])
    for x in data[::-1]:  # as PaddleSlim's examples drive it: the trap is real
        paddleslim._show(raw, x)
    assert paddleslim._threshold(raw) < 0.7 * whole[0]


def test_emd_sees_a_large_negative_value() -> None:
    x = np.random.default_rng(0).uniform(-1, 0.01, (64, 8)).astype(np.float32)
    assert threshold("paddleslim:emd", [x])[0] > 0.25
    raw = paddleslim._create("EMDObserver")
    paddleslim._show(raw, x)
    assert paddleslim._threshold(raw) < 0.02


def test_avg_is_of_batches_not_of_tokens() -> None:
    x = np.ones((4, 2), np.float32)
    x[0, 0] = 9
    assert threshold("paddleslim:avg", [x, np.ones((4, 2), np.float32)])[0] == 5


@pytest.mark.parametrize("name", NAMES)
def test_dull_inputs(name: str) -> None:
    zeros = np.zeros((4, 6), np.float32)
    assert threshold(name, [zeros, zeros], 2).tolist() == [0, 0]
    constant = threshold(name, [np.full((4, 6), -3, np.float32)])[0]
    assert 0.25 * 3 <= constant <= 3.001


def test_rows_have_a_threshold_each() -> None:
    x = np.concatenate([np.ones((8, 4)), np.full((8, 4), 5)], axis=1).astype(np.float32)
    x[0] *= 2
    assert threshold("paddleslim:absmax", [x], 2).tolist() == [2, 10]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(CalibrationError, match=r"'paddleslim:histo'\. Did you mean paddleslim:hist\? Known: .*mse"):
        live_observer("paddleslim:histo", 1)


def test_values_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddleslim, "KEEP_BYTES", 1 << 20)
    observer = live_observer("paddleslim:mse", 1)
    observer.update(np.ones((1 << 17, 1), np.float32))
    with pytest.raises(
        CalibrationError, match=r"paddleslim:mse has to keep every value .* 1 MiB.*use the observer mse"
    ):
        observer.update(np.ones((1 << 18, 1), np.float32))


def test_without_paddleslim_the_error_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("paddleslim"):
            raise ImportError("No module named 'paddleslim'")
        return real(name, *args, **kwargs)

    paddleslim._import_observers.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match=r"pip install --no-deps paddleslim==2\.6\.0 && pip install six requests"):
        live_observer("paddleslim:hist", 1)
    paddleslim._import_observers.cache_clear()
