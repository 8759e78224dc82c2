"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantbench.infer.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how to continue it."""

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Output:
    """One new token of one request. `text` is what became certain with it: empty while a character or a possible
    stop string is incomplete, and always empty for a model without a tokenizer."""

    request: int  # the number that Engine.add returned
    token: int
    text: str
    finish_reason: str | None  # None while it goes on; "stop" | "length"


@dataclass(frozen=True)
class Token:
    """One streamed token of a single request; fields as in Output."""

    id: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A finished request. `ids` include the stop token; `text` ends before a stop string or stop token."""

    ids: list[int]
    text: str
    finish_reason: str  # "stop" | "length"
    prompt_tokens: int
    reused_tokens: int  # prompt tokens that were found in the cache
