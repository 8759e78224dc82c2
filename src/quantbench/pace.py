"""A speed budget: what candidates cost in decode time on this machine, and what a choice among them comes to.

`calibrate.speed` measures; here seconds become the integer costs that `calibrate.budget` chooses by, and tokens/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quantbench.calibrate.budget import Option, Selection
from quantbench.calibrate.job import checkpoint_path
from quantbench.calibrate.sensitivity import Group
from quantbench.calibrate.speed import STEPS, Pace, StepTimes
from quantbench.errors import RequestError
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.validate.timing import Load
from quantbench.mixture import Losses, Mixture
from quantbench.reports.progress import Progress


@dataclass(frozen=True)
class Speed:
    """What is asked: decode of `batch` sequences at once, each behind `prompt` tokens."""

    tokens_per_s: float
    batch: int = 1
    prompt: int = 128
    threads: int | None = None

    @property
    def load(self) -> Load:
        return Load(self.prompt, STEPS, (self.batch,))

    @property
    def budget_ns(self) -> int:
        """Of one step, which makes `batch` tokens. Raises RequestError for a speed that is none."""
        if not 0 < self.tokens_per_s < float("inf"):
            raise RequestError(f"--budget-tokens-per-s {self.tokens_per_s:g}: give a speed above 0")
        return int(self.batch / self.tokens_per_s * 1e9)


@dataclass(frozen=True)
class TimedMixture:
    """A mixture whose groups have a cost in time: nanoseconds of a decode step beyond the base candidate's."""

    mixture: Mixture
    times: StepTimes
    asked: Speed

    def differ(self, candidate: str, group: Group) -> bool:
        return not self.mixture.treated_alike(candidate, self.times.base, group)

    def cost(self, candidate: str, group: Group) -> int:
        """Nanoseconds of a step that a group takes beyond the base's; nothing where it is held as the base holds it."""
        return round(self.times.extra_s[group.fused][candidate] * 1e9) if self.differ(candidate, group) else 0

    def options(self, losses: Losses) -> dict[str, list[Option]]:
        return self.mixture.options(losses, self.cost)

    @cached_property
    def fixed_ns(self) -> int:
        """A step of the base alone."""
        return round(self.times.base_s * 1e9)

    def tokens_per_s(self, selection: Selection) -> float:
        """The forecast: the base's step and the sum of what the groups take beyond it."""
        return self.asked.batch / max(self.fixed_ns + selection.cost, 1) * 1e9

    def refusal(self, least: int) -> str:
        fastest = self.asked.batch / max(self.fixed_ns + least, 1) * 1e9
        return (
            f"the budget of {self.asked.tokens_per_s:g} tokens/s cannot be met: the fastest choice makes {fastest:.4g} "
            f"at batch {self.asked.batch}. Lower the budget, or allow a faster mode"
        )


def open_pace(folder: Path, mixture: Mixture, asked: Speed) -> Pace:
    """Loads every candidate's checkpoint."""
    checkpoints = {name: open_model(checkpoint_path(folder, name)) for name in mixture.variants}
    return Pace(checkpoints, mixture.groups, asked.load, asked.threads)


def timed(pace: Pace, mixture: Mixture, asked: Speed, progress: Progress) -> TimedMixture:
    """Times every candidate's kinds of groups in turn."""
    progress.stage("time", pace.visits())
    base = pace.base
    times = pace.measure(lambda c, g: not mixture.treated_alike(c, base, g), progress.advance)
    return TimedMixture(mixture, times, asked)
