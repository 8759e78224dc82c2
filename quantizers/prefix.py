"""Which tokens make the inputs that no static scale can hold: the mathematics of prefixed outliers.

PrefixQuant (Chen et al. 2024, arXiv 2410.05265, § 4.1): the largest |x| of every token at a linear's input, over the
median token's. A sink token stands out a thousand times; everything else stays within some tens. One static scale is
max |x| / 127 over all tokens, so that ratio is how many times coarser the codes of the median token get.

    statistic        seconds: nothing beside the pass that it looks at; arrays of one number per token
    use it           before static scales per tensor; scales per token do not need it
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from quantbench.scales.arrays import F32

GIANT = 64.0  # times the median token: what PrefixQuant calls an outlier (its η)


def token_ratios(largest: F32) -> F32:
    """f32[T]: each token's largest |x| over the median token's, from the largest |x| f32[T]. Zeros where that is 0."""
    median = np.median(largest)
    ratios: F32 = (largest / median if median > 0 else np.zeros_like(largest)).astype(np.float32)
    return ratios


def spread(ratios: Mapping[str, F32]) -> float:
    """The mean over all inputs (name -> f32[T]) of the largest ratio: 1 where all tokens are alike."""
    return float(np.mean([r.max() for r in ratios.values()]))


def largest(ratios: Mapping[str, F32]) -> tuple[str, float]:
    """The input with the largest ratio, and that ratio."""
    name = max(ratios, key=lambda n: float(ratios[n].max()))
    return name, float(ratios[name].max())


def giants(ratios: Mapping[str, F32], ids: npt.NDArray[np.int32]) -> list[int]:
    """Distinct ids of the tokens i32[T] that are giant at some input, the most frequent first (then the lower id)."""
    tall = np.max(list(ratios.values()), axis=0) > GIANT
    found, counts = np.unique(ids[tall], return_counts=True)
    return [int(i) for i in found[np.lexsort((found, -counts))]]
