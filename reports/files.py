"""What the JSON files of a run folder hold, as types; docs/architecture.md is the contract.

Keys that are not listed here are left out of the report but never refused, so that a writer may add to its file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantbench.errors import CheckpointError


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


Interval = tuple[float, float]


class PerplexityScore(_Record):
    perplexity: float
    nll: float
    increase: float | None = None  # relative to the baseline: 0.037 = +3.7%
    increase_interval: Interval | None = None  # paired bootstrap, 95%


class Perplexity(_Record):
    data: str
    tokens: int
    context: int
    variants: dict[str, PerplexityScore]


class DivergenceScore(_Record):
    kl: float  # nats per token, baseline against variant
    kl_interval: Interval | None = None
    top1: float  # share of positions whose most likely token is the baseline's
    top1_interval: Interval | None = None


class Divergence(_Record):
    data: str
    tokens: int
    variants: dict[str, DivergenceScore]


class ChoiceScore(_Record):
    accuracy: float
    delta: float | None = None
    delta_interval: Interval | None = None


class Choices(_Record):
    data: str
    questions: int
    variants: dict[str, ChoiceScore]


class Accuracy(_Record):
    baseline: str
    perplexity: list[Perplexity] = Field(default_factory=list)
    divergence: list[Divergence] = Field(default_factory=list)
    choices: list[Choices] = Field(default_factory=list)


class Spread(_Record):
    median: float
    min: float
    max: float


class Prefill(_Record):
    tokens_per_s: Spread
    speedup: Spread | None = None  # over the baseline, round by round; absent for the baseline itself
    gop_per_s: float | None = None
    share_of_ceiling: float | None = None


class Decode(_Record):
    tokens_per_s: Spread
    speedup: Spread | None = None
    ttft_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    gb_per_s: float | None = None
    share_of_ceiling: float | None = None
    bound: str | None = None
    why: str | None = None


class Speed(_Record):
    load_s: float | None = None
    checkpoint_bytes: int | None = None
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    peak_rss_bytes: int | None = None
    prefill: Prefill | None = None
    decode: dict[str, Decode] = Field(default_factory=dict)


class Throughput(_Record):
    baseline: str | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    prompt: int
    output: int
    rounds: int | None = None
    ceilings: dict[str, float] = Field(default_factory=dict)
    variants: dict[str, Speed]


class LayerParity(_Record):
    name: str
    sqnr_simulated_db: float | None = None
    sqnr_served_db: float | None = None
    sqnr_served_to_simulated_db: float | None = None


class Departure(_Record):
    layer: str
    why: str


class VariantParity(_Record):
    codes_compared: int
    codes_different: int
    scales_different: int = 0
    top1_served_simulated: float | None = None
    kl_served_simulated: float | None = None
    top1_free_running: float | None = None  # of a simulation that never sees the served states: judged by nothing
    kl_free_running: float | None = None
    layers: list[LayerParity] = Field(default_factory=list)
    first_departure: Departure | None = None


class Parity(_Record):
    tokens: int
    variants: dict[str, VariantParity]


class PlannedLayer(_Record):
    weights: str
    granularity: str | None = None
    group_size: int | None = None
    activations: str | None = None
    dynamic: bool = False
    method: str = "rtn"
    rule: str = "default"


class PlannedVariant(_Record):
    mode: str | dict[str, Any]
    dtype: str
    cache: dict[str, Any] = Field(default_factory=dict)
    transforms: list[dict[str, Any]] = Field(default_factory=list)
    prefix: str | list[int] = "off"
    layers: dict[str, PlannedLayer] = Field(default_factory=dict)

    @property
    def mode_name(self) -> str:
        return self.mode if isinstance(self.mode, str) else str(self.mode.get("name", "?"))


class Plan(_Record):
    model: str | dict[str, Any]
    variants: dict[str, PlannedVariant]
    forecast: dict[str, Any] = Field(default_factory=dict)


class Gate(_Record):
    name: str  # "perplexity_increase", "decode_speedup", …
    variant: str
    limit: float
    value: float
    interval: Interval | None = None
    passed: bool
    why: str  # "a8w8: perplexity_increase +3.70% meets the limit of at most +5.00%"


class Gates(_Record):
    gates: list[Gate]


class TableEntry(_Record):
    kind: str
    format: str
    granularity: str
    observer: str | None = None
    reason: str | None = None
    loss: float | None = None
    group_size: int | None = None
    shape: list[int] | None = None


class Table(_Record):
    sha256: str | None = None  # of scales.safetensors
    entries: dict[str, TableEntry]


class Stage(_Record):
    """Noise of one linear, as relative squared errors, behind the word `after` ("" before any)."""

    after: str
    weight: float
    output: float
    input: float | None = None
    steps: float | None = None
    weight_beyond: float = 0.0
    input_beyond: float | None = None


class Diagnosis(_Record):
    layers: dict[str, list[Stage]]


M = TypeVar("M", bound=BaseModel)


def read_json(path: Path, model: type[M], stage: str) -> M:
    """The file at `path` as a `model`. Raises CheckpointError naming the file and every field that is wrong."""
    again = f"write it again with `quantbench calibrate RECIPE --from {stage}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}); {again}") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(*(_problem(path, e["loc"], e["msg"], again) for e in error.errors())) from error


def _problem(path: Path, where: tuple[int | str, ...], message: str, again: str) -> str:
    place = ".".join(str(part) for part in where) or "the file"
    return f"{path}: {place}: {message[0].lower()}{message[1:]}; {again}"
