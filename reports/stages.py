"""What each transform did to the noise of quantizing: the stages of every linear, and of a variant as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantbench.reports.files import Stage

EXACT_DB = 200.0  # an error of zero is reported as this instead of infinity
NORMAL_P999 = 3.29  # 99.9% of normal values are below so many times their root mean square
NAMES = {"": "as the model came", "stored": "as stored"}


@dataclass(frozen=True)
class StageFacts:
    """One linear at one stage. SQNR in dB, None where it does not apply; *_beyond: share of the values clipped."""

    after: str
    weight_sqnr_db: float | None
    input_sqnr_db: float | None
    output_sqnr_db: float | None
    steps: float | None  # static int8: root mean square of the median channel in steps of the scale
    weight_beyond: float
    input_beyond: float | None


def sqnr_db(loss: float | None) -> float | None:
    """-10·log10 of a relative squared error, capped at EXACT_DB."""
    if loss is None or not math.isfinite(loss) or loss < 0:
        return None
    return EXACT_DB if loss == 0 else min(EXACT_DB, -10 * math.log10(loss))


def stage_facts(stages: Sequence[Stage]) -> tuple[StageFacts, ...]:
    return tuple(
        StageFacts(
            s.after, sqnr_db(s.weight), sqnr_db(s.input), sqnr_db(s.output), s.steps, s.weight_beyond, s.input_beyond
        )
        for s in stages
    )


def name_of(after: str) -> str:
    """What a table calls a stage: "after smooth"."""
    return NAMES.get(after, f"after {after}")


def variant_stages(layers: Mapping[str, Sequence[StageFacts]]) -> list[dict[str, Any]]:
    """Per stage of a variant the median over its linears, and the linear whose output is worst there.

    Linears whose method stores what was chosen have no stage of their own for it: they count as they were.
    """
    lengths = {len(stages) for stages in layers.values()}
    longest = max(layers.values(), key=len, default=())
    found = []
    for index in range(max(lengths, default=0)):
        at = {name: stages[min(index, len(stages) - 1)] for name, stages in layers.items() if stages}
        worst = min(at, key=lambda name: (_known(at[name].output_sqnr_db), name))
        found.append(
            {
                "after": longest[index].after,
                "weight_sqnr_db": _median([s.weight_sqnr_db for s in at.values()]),
                "input_sqnr_db": _median([s.input_sqnr_db for s in at.values()]),
                "output_sqnr_db": _median([s.output_sqnr_db for s in at.values()]),
                "steps": _median([s.steps for s in at.values()]),
                "beyond": float(np.mean([s.weight_beyond for s in at.values()])),
                "worst": worst,
                "worst_output_sqnr_db": at[worst].output_sqnr_db,
            }
        )
    return found


def _known(db: float | None) -> float:
    return math.inf if db is None else db


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None
