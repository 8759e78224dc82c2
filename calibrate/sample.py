"""Rows of a block's taps as they really are: what searches try their candidates on.

A few whole sequences are run once more and every n-th token is kept, so that the first tokens (attention sinks, with
their giant activations) are there in the share that they have in the data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.calibrate.forward import BlockForward, Float
from quantbench.calibrate.hidden import HiddenStates

SEQUENCES, ROWS = 8, 512


@dataclass
class TapSample:
    """`sample(taps)` -> {tap: f32[rows <= 512, C]} of one block, the same rows however often it is asked."""

    forward: BlockForward
    layer: int
    weights: Mapping[str, npt.NDArray[Any]]
    hidden: HiddenStates
    _rows: dict[str, Float] = field(default_factory=dict)

    def __call__(self, taps: Collection[str]) -> dict[str, Float]:
        wanted = [tap for tap in taps if tap not in self._rows]
        if wanted:
            self._run(wanted)
        return {tap: self._rows[tap] for tap in taps}

    def _run(self, taps: list[str]) -> None:
        samples = slice(0, min(SEQUENCES, self.hidden.shape[0]))

        def keep(tap: str, x: Float) -> None:
            flat = x.reshape(len(x), -1)
            self._rows[tap] = np.ascontiguousarray(flat[:: -(-len(flat) // ROWS)], np.float32)

        def run(samples: slice) -> Float:
            return self.forward.run(self.hidden.read(samples), self.hidden.lengths[samples], keep, taps)

        self.forward.load(self.layer, self.weights)
        for _ in self.forward.each(run, [samples]):  # as all of calibration: one thread, the same bits
            pass
