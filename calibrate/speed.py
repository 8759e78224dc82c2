"""What each group of linears costs in time, measured on this machine: decode steps of whole models, timed in turn.

Every candidate is loaded as a checkpoint of its own and one engine decodes. A visit gives the engine a model that is
the first candidate in everything but one kind of group (q/k/v of all blocks, say), which it has from another one; it
stands beside a visit to the first candidate alone, now before it and now behind it. What counts is the median ratio of
such pairs: whatever slows the machine for longer than two visits slows both. What a ratio is above or below 1, of the
first candidate's median step and over the number of groups that differ, is what one such group costs more or less. It
includes what belongs to the group: quantizing its input, and how far its weights push others out of the caches. All
that no choice changes (attention, norms, the scheduler, sampling) is in the step of the first candidate.

The sum of these differences is the forecast of any mixture; `step_of` measures a mixture itself, to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from quantbench.calibrate.sensitivity import Group
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.engine import Engine
from quantbench.infer.engine.forward import Model
from quantbench.infer.engine.weights import load_model
from quantbench.infer.validate.timing import Load, time_decode

ROUNDS = 5
STEPS = 24
Labels = Mapping[str, str]  # group -> candidate that it is taken from


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step of `base`, and per kind of group and candidate what one group costs beyond base's."""

    base: str
    base_s: float
    extra_s: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Spread:
    """Of one figure over rounds."""

    median: float
    least: float
    most: float


class Pace:
    """Candidates that are loaded, and one engine that decodes with any mixture of them."""

    def __init__(
        self, checkpoints: Mapping[str, ModelSource], groups: list[Group], load: Load, threads: int | None = None
    ) -> None:
        """`checkpoints`: candidate -> its checkpoint, the first is the base. `load` has one batch. Raises what loading
        raises, and RequestError where the model's positions are too few for the load."""
        self.base, *_ = checkpoints
        self.groups, self.load = groups, load
        self._engine = Engine.load(checkpoints[self.base], threads=threads, **load.engine_options())
        runner = self._engine.runner
        self._models = {self.base: runner.model} | {
            name: load_model(source, runner.ops, None) for name, source in checkpoints.items() if name != self.base
        }
        vocabulary = self._engine.config.vocab_size
        prompts = np.random.default_rng(load.seed).integers(0, vocabulary, (load.batches[0], load.prompt))
        self._prompts: list[list[int]] = prompts.tolist()

    @property
    def candidates(self) -> list[str]:
        return list(self._models)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(g.fused for g in self.groups))

    def visits(self) -> int:
        """Of a whole measurement: what a progress bar counts."""
        return ROUNDS * (1 + len(self.kinds) * (len(self._models) - 1))

    def measure(self, differ: Callable[[str, Group], bool], tick: Callable[[], None]) -> StepTimes:
        """`differ(candidate, group)`: whether it holds the group otherwise than the base. `tick`: after a visit."""
        asked = [(kind, c) for kind in self.kinds for c in self.candidates[1:]]
        counts = {(k, c): sum(g.fused == k and differ(c, g) for g in self.groups) for k, c in asked}
        base: list[float] = []
        ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in asked}
        for number in range(ROUNDS):
            base.append(self._visit(self._models[self.base]))
            tick()
            for kind, candidate in asked:
                if counts[kind, candidate]:
                    labels = {g.name: candidate for g in self.groups if g.fused == kind}
                    alone, mixed = self._pair(self.mixed(labels), number)
                    base.append(alone)
                    ratios[kind, candidate].append(mixed / alone)
                tick()
        extra: dict[str, dict[str, float]] = {kind: {self.base: 0.0} for kind in self.kinds}
        for (kind, candidate), found in ratios.items():
            beyond = (median(found) - 1) * median(base) if found else 0.0
            extra[kind][candidate] = beyond / max(counts[kind, candidate], 1)
        return StepTimes(self.base, median(base), extra)

    def step_of(self, labels: Labels, base_s: float) -> Spread:
        """Seconds of a decode step of a mixture: how many steps of the base it takes in turn with it, times `base_s`,
        the base's step that a forecast was made from."""
        pairs = [self._pair(self.mixed(labels), number) for number in range(ROUNDS)]
        steps = [mixed / alone * base_s for alone, mixed in pairs]
        return Spread(median(steps), min(steps), max(steps))

    def mixed(self, labels: Labels) -> Model:
        """The base with every group in `labels` as the candidate it names has it."""
        base = self._models[self.base]
        layers = list(base.layers)
        head = base.head
        for group in self.groups:
            model = self._models[labels.get(group.name, self.base)]
            if group.layer is None:
                head = model.head
            else:
                change: dict[str, Any] = {group.fused: getattr(model.layers[group.layer], group.fused)}
                layers[group.layer] = replace(layers[group.layer], **change)
        return replace(base, layers=tuple(layers), head=head)

    def _pair(self, model: Model, number: int) -> tuple[float, float]:
        """A visit to the base and one to `model`, in the order of the round `number`."""
        base = self._models[self.base]
        if number % 2:
            mixed = self._visit(model)
            return self._visit(base), mixed
        return self._visit(base), self._visit(model)

    def _visit(self, model: Model) -> float:
        """Median seconds of the decode steps of one visit."""
        self._engine.runner.model = model
        return median(time_decode(self._engine, self._prompts, self.load).steps)
