"""What fits: how many tokens the cache holds, how long a sequence may become, and what a prompt must satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantbench.errors import RequestError
from quantbench.infer.engine.cache import pages_for, token_bytes
from quantbench.infer.models import ModelConfig
from quantbench.infer.ops import PAGE

_CACHE = "the cache (cache_tokens at load)"
CACHE_BYTES = 1 << 30  # of a cache whose size nobody asked for; untouched pages cost nothing


@dataclass(frozen=True)
class Limits:
    """Capacities of one engine, in tokens except `max_batch` (sequences). A prefix is never counted: its positions and
    its room in the cache are set aside."""

    cache_tokens: int  # all sequences together, a multiple of 64
    max_length: int  # of one generated sequence, prompt included
    max_window: int  # of one scored window
    max_batch: int
    chunk: int  # prompt tokens per step
    reason: str  # what bounds max_length, for people
    window_reason: str  # what bounds max_window


def limits_of(
    config: ModelConfig,
    cache_format: str,
    cache_tokens: int | None,
    max_batch: int,
    chunk: int,
    prefix: int = 0,
    room: int | None = None,
) -> Limits:
    """Limits of an engine. Raises RequestError for sizes below one, all at once.

    A cache whose size nobody asked for takes at most `room` bytes, where a device says how many it has left, and
    raises RequestError where they are too few for a page.

    Dynamic RoPE turns every key anew as a sequence grows past the trained length; keys in a cache cannot follow, so
    generation ends there. A window that is scored at once knows its length and may be `factor` times longer, unless
    it stands behind a `prefix` of so many tokens, whose keys were turned for the trained length.
    """
    sizes = {"cache_tokens": 1 if cache_tokens is None else cache_tokens, "max_batch": max_batch, "chunk": chunk}
    if problems := [f"{name}: {size} is below 1" for name, size in sizes.items() if size < 1]:
        raise RequestError(*problems)
    trained = reach = config.max_positions
    reason = window_reason = "the model's positions"
    if config.rope.kind == "dynamic":
        trained = config.rope.original_max_positions
        reach = trained if prefix else int(trained * config.rope.factor)
        reason = "the trained length: with dynamic RoPE a KV cache cannot grow beyond it (scoring a window can)"
    if prefix:
        trained, reach = trained - prefix, reach - prefix
        reason = window_reason = f"{reason}, {prefix} of which the checkpoint's prefix takes"
    if cache_tokens is None and room is not None:
        cache_tokens = _fitting(config, cache_format, max_batch * (reach + prefix), room)
    elif cache_tokens is None:
        affordable = CACHE_BYTES // token_bytes(config, cache_format)
        cache_tokens = max(PAGE, min(max(reach, max_batch * 512), affordable))
    capacity = pages_for(cache_tokens) * PAGE
    return Limits(
        cache_tokens=capacity,
        max_length=min(trained, capacity),
        max_window=min(reach, capacity),
        max_batch=max_batch,
        chunk=chunk,
        reason=_CACHE if capacity < trained else reason,
        window_reason=_CACHE if capacity < reach else window_reason,
    )


def _fitting(config: ModelConfig, cache_format: str, useful: int, room: int) -> int:
    page = PAGE * token_bytes(config, cache_format)
    if room < page:
        raise RequestError(
            f"the KV cache: {max(room, 0) / 1e6:.0f} MB are left beside weights and work space, a page of "
            f"{PAGE} tokens takes {page / 1e6:.1f} MB; give a smaller chunk or max_batch, or another mode"
        )
    return min(useful, room // page * PAGE)


def check_ids(ids: Sequence[int], config: ModelConfig, limit: int, reason: str) -> None:
    """Raises RequestError, all problems at once, for no ids, more than `limit`, or ids outside the vocabulary."""
    if problems := list(_problems(ids, config, limit, reason)):
        raise RequestError(*problems)


def _problems(ids: Sequence[int], config: ModelConfig, limit: int, reason: str) -> Iterator[str]:
    if len(ids) == 0:
        yield "the prompt is empty; give at least one token (models with one begin with their BOS token)"
    if len(ids) > limit:
        yield f"{len(ids)} tokens are more than the {limit} allowed by {reason}; shorten the prompt"
    bad = sorted({int(i) for i in ids if not 0 <= i < config.vocab_size})
    if bad:
        yield f"token ids {bad[:5]} are outside the vocabulary of {config.vocab_size}; is the tokenizer this model's?"
