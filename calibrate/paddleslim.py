"""PaddleSlim's activation observers behind one small interface: `paddleslim:<name>` in a recipe.

They see the values themselves, batch by batch (live), so their thresholds cannot be merged. Driven as PaddleSlim's own
examples do, most of them are wrong without a word; the adapters feed them so that they are right:

    avg         averages over the first axis: given [tokens, C] it would average single tokens; given [1, tokens, C]
                it is the mean of the batches' absolute maxima
    mse, emd    keep the last batch only: all batches are kept and given at once, up to `KEEP_BYTES` a tap
    emd         looks for the range at max(x), not max|x|: the sign is turned where the minimum is larger
    kl          measures its threshold from the smallest value, which is meant to be 0: it is shown |x|
    hist, kl    fail on values that are all equal: such a tap has the threshold max|x|
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantbench.calibrate.forward import Float
from quantbench.calibrate.paddle_device import import_paddle, quiet_import
from quantbench.errors import CalibrationError, DependencyError
from quantbench.registry import Registry

KEEP_BYTES = 1 << 30  # what mse and emd may keep of one tap


class LiveObserver(Protocol):
    """Sees one tap's values f32[T, C] batch by batch; `threshold` gives the range f32[R] of its R rows at the end."""

    def update(self, x: Float) -> None: ...
    def threshold(self) -> npt.NDArray[np.float32]: ...


LIVE: Registry[Callable[[int], LiveObserver]] = Registry("live observer", CalibrationError)


def live_observer(name: str, rows: int) -> LiveObserver:
    """The observer `paddleslim:<name>` for a tap of `rows` rows. Raises CalibrationError for an unknown name."""
    return LIVE[name](rows)


class _Streaming:
    """An observer that is right when it sees the batches one after another."""

    def __init__(self, class_name: str, magnitude: bool, rows: int) -> None:
        self._magnitude = magnitude
        self._observers = [_create(class_name) for _ in range(rows)]
        self._minimum = np.full(rows, np.inf, np.float32)
        self._maximum = np.full(rows, -np.inf, np.float32)

    def update(self, x: Float) -> None:
        split = _by_row(np.abs(x) if self._magnitude else x, len(self._observers))
        self._minimum = np.minimum(self._minimum, split.min(axis=(1, 2)))
        self._maximum = np.maximum(self._maximum, split.max(axis=(1, 2)))
        for observer, values in zip(self._observers, split, strict=True):
            _show(observer, values)

    def threshold(self) -> npt.NDArray[np.float32]:
        found = [
            max(abs(low), abs(high)) if low == high else _threshold(observer)
            for observer, low, high in zip(self._observers, self._minimum, self._maximum, strict=True)
        ]
        return np.array(found, np.float32)


class _Keeping:
    """An observer that remembers only its last batch: it is shown everything as one batch, at the end."""

    def __init__(self, class_name: str, turn: bool, rows: int) -> None:
        self._name, self._turn, self._rows = class_name, turn, rows
        self._kept: list[Float] = []
        self._bytes = 0

    def update(self, x: Float) -> None:
        self._bytes += x.nbytes
        if self._bytes > KEEP_BYTES:
            name = self._name.removesuffix("Observer").lower()
            raise CalibrationError(
                f"observer paddleslim:{name} has to keep every value of a tap, and these are more than "
                f"{KEEP_BYTES >> 20} MiB. Lower calibration.samples or calibration.length, or use the observer mse, "
                "which works on histograms"
            )
        self._kept.append(x.copy())

    def threshold(self) -> npt.NDArray[np.float32]:
        return np.array([self._of_row(v) for v in _by_row(np.concatenate(self._kept), self._rows)], np.float32)

    def _of_row(self, values: Float) -> float:
        if not values.any():
            return 0.0
        observer = _create(self._name)
        _show(observer, -values if self._turn and -values.min() > values.max() else values)
        return _threshold(observer)


def _by_row(x: Float, rows: int) -> Float:
    """[T, C] -> [R, T, C/R]."""
    return np.ascontiguousarray(x.reshape(len(x), rows, -1).transpose(1, 0, 2))


def _create(class_name: str) -> Any:
    return getattr(_import_observers(), class_name)()._instance(None)


@cache
def _import_observers() -> Any:
    import_paddle()
    with quiet_import():
        try:
            from paddleslim.quant import observers
        except ImportError as error:
            raise DependencyError(
                f"a paddleslim: observer is asked for, but PaddleSlim cannot be imported here ({error}). Install "
                "it with: pip install --no-deps paddleslim==2.6.0 && pip install six requests decorator scikit-learn "
                "pyzmq (without --no-deps it brings an OpenCV that breaks numpy 2)"
            ) from error
    return observers


def _show(observer: Any, values: Float) -> None:
    paddle = import_paddle()
    with paddle.no_grad():
        observer(paddle.to_tensor(values[None]))


def _threshold(observer: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it makes numbers of arrays of one element
        observer.cal_thresholds()
        return float(observer.scales())


for _word, _class in (("absmax", "AbsmaxObserver"), ("avg", "AVGObserver"), ("hist", "HistObserver")):
    LIVE.add(f"paddleslim:{_word}", partial(_Streaming, _class, False))
LIVE.add("paddleslim:kl", partial(_Streaming, "KLObserver", True))
LIVE.add("paddleslim:mse", partial(_Keeping, "MSEObserver", False))
LIVE.add("paddleslim:emd", partial(_Keeping, "EMDObserver", True))
