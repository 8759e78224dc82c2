"""The recipe's word `prefix`: which tokens to put in front of every sequence, and their keys and values.

The float model runs many short windows of the calibration text behind every candidate, block by block, all candidates
at once. What counts is the text behind them: how far its largest token stands out at every input of a linear. Single
tokens first (BOS, end of text, newline, full stop, the text's most frequent token); then, while giants remain, the best
so far with one more of them, or with one of the giants. Windows are short and many because it is what stands first that
becomes a sink: behind a BOS alone one text in twenty still makes its own (SmolLM2), behind BOS and newline none does.
Among those that are about as good the float model's own likelihood of longer windows decides: a prefix is text too, and
costs or gains up to 1 % of perplexity by what it says. Keys and values are those of the same pass, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from quantbench.calibrate.apply import tap_factors, tap_shifts
from quantbench.calibrate.data import TokenBatches
from quantbench.calibrate.forward import ALL_TAPS, BlockForward, Float, Int
from quantbench.calibrate.rotated import RotatedSource
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.prefix import Prefix, read_prefix, write_prefix
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.models import TAPS, ModelConfig, block_prefix
from quantbench.infer.validate.likelihood import token_nll
from quantbench.quantizers.prefix import giants, largest, spread, token_ratios
from quantbench.scales.statistics import Statistics, merge, observe
from quantbench.scales.table import ScaleTable, write_atomically

WINDOWS, LENGTH = 192, 4  # of calibration text that every candidate is tried on
LONG_WINDOWS, LONG_LENGTH = 8, 96  # that likelihoods are taken of
FINALISTS, CLOSE = 8, 1.3  # candidates, of a spread at most so many times the least, whose likelihoods are taken
LONGEST = 4  # tokens of a prefix that is searched
GAIN = 0.9  # of the spread, at most, that one more token must leave
WORTH = 0.8  # of the plain model's spread, at most, that a searched prefix must leave
FOLDER, ENTRY = "prefix", "prefix.json"  # of the run folder; of one prefix


class Words(Protocol):
    """What is asked of the tokenizer."""

    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def token(self, index: int) -> str: ...


@dataclass
class Look:
    """The text behind one candidate: `ratios` of its tokens `ids` i32[T] by input, and the candidate's K and V.

    `hidden` f32[W, p + L, D] are the states of prefix and text before the next block.
    """

    prefix: tuple[int, ...]
    ids: Int
    hidden: Float
    ratios: dict[str, Float] = field(default_factory=dict)
    kept: dict[str, list[Float]] = field(default_factory=lambda: {"k": [], "v": []})  # [KV, p, d] of each block

    @property
    def spread(self) -> float:
        return spread(self.ratios)

    def record(self, layer: int, tap: str, x: Float) -> None:
        """The tap hook of one block."""
        p = len(self.prefix)
        if tap in TAPS:
            rows = np.abs(x).max(axis=1).reshape(len(self.hidden), -1)[:, p:]
            self.ratios[f"{block_prefix(layer)} {tap}"] = token_ratios(rows.reshape(-1))
        else:
            self.kept[tap].append(x[:p].transpose(1, 0, 2).copy())


@dataclass(frozen=True)
class Search:
    """Looks at candidates on windows of the calibration text, evenly spaced."""

    forward: BlockForward
    source: ModelSource
    tokens: TokenBatches

    def look(self, candidates: Sequence[tuple[int, ...]]) -> list[Look]:
        """One pass over the blocks for all `candidates`."""
        return self._passed(candidates, self.windows(WINDOWS, LENGTH), ALL_TAPS)

    def likelihoods(self, candidates: Sequence[tuple[int, ...]]) -> list[float]:
        """Mean negative log-likelihood in nats of the text behind each candidate, by the float model."""
        windows = self.windows(LONG_WINDOWS, LONG_LENGTH)
        found = []
        for look in self._passed(candidates, windows, ()):
            text = look.hidden[:, len(look.prefix) :]
            nll = [token_nll(self.forward.head(x), ids) for x, ids in zip(text, windows, strict=True)]
            found.append(float(np.concatenate(nll).mean()))
        return found

    def _passed(self, candidates: Sequence[tuple[int, ...]], windows: Int, taps: Collection[str]) -> list[Look]:
        looks = [
            Look(c, windows.reshape(-1), x)
            for c, x in zip(candidates, self._embedded(candidates, windows), strict=True)
        ]
        for layer in range(self.source.config.num_layers):
            self.forward.load(layer, self.source.float_block(layer))
            for _ in self.forward.each(partial(self._through, layer, taps), looks):
                pass
        return looks

    def _embedded(self, candidates: Sequence[tuple[int, ...]], windows: Int) -> list[Float]:
        """The windows behind each candidate, f32[windows, p + length, D]: the embedding is read once for all."""
        ids = [_behind(windows, c) for c in candidates]
        words = np.unique(np.concatenate([i.reshape(-1) for i in ids]))
        rows = self.forward.embed(words[None])[0]
        return [rows[np.searchsorted(words, i)] for i in ids]

    def _through(self, layer: int, taps: Collection[str], look: Look) -> None:
        lengths = np.full(len(look.hidden), look.hidden.shape[1], np.int32)
        look.hidden = self.forward.run(look.hidden, lengths, partial(look.record, layer), taps)

    def windows(self, count: int, length: int) -> Int:
        """i32[count, length]; fewer and shorter where there is not as much text."""
        text = real_tokens(self.tokens)
        length = min(length, len(text))
        starts = np.unique(np.linspace(0, len(text) - length, count).astype(np.int64))
        return text[starts[:, None] + np.arange(length)]


def _behind(windows: Int, prefix: tuple[int, ...]) -> Int:
    front = np.broadcast_to(np.array(prefix, np.int32), (len(windows), len(prefix)))
    return np.concatenate([front, windows], axis=1)


def find_prefix(search: Search, wanted: str | Sequence[int], words: Words) -> Prefix:
    """The prefix of the recipe's word: "auto" searches, token ids are taken as they are.

    Raises CalibrationError, with the figures, where the text behind it has inputs as large as without it.
    """
    if wanted == "auto":
        plain, best, tried = searched(search, words)
    else:
        ids = tuple(int(i) for i in wanted)
        plain, best = search.look([(), ids])
        tried = 0
    before, after = _told(plain), _told(best)
    name = " ".join(repr(words.token(i)) for i in best.prefix)
    if best.spread > plain.spread * (WORTH if tried else 1):
        what = f"auto: the best of {tried} candidates" if tried else "these tokens"
        raise CalibrationError(
            f"prefix: {what}, {list(best.prefix)} ({name}), leaves the largest inputs of the text at {after}; without "
            f"it they are at {before}. This model has no use for it: prefix: off"
        )
    among = f", the best of {tried} tried" if tried else ""
    reason = f"{name}{among}: largest inputs of the text at {after}, without it {before}"
    return Prefix(best.prefix, np.stack(best.kept["k"]), np.stack(best.kept["v"]), reason)


def searched(search: Search, words: Words) -> tuple[Look, Look, int]:
    """The plain model, the best candidate, and how many were tried: single tokens, then one more at a time."""
    marks = singles(search.tokens, words, search.source.config)
    plain, *tried = search.look([(), *((i,) for i in marks)])
    best = min(tried, key=lambda look: look.spread)
    while len(best.prefix) < LONGEST and (found := giants(best.ratios, best.ids)):
        more = dict.fromkeys([*marks, *found[:2]])
        longer = [(*best.prefix, i) for i in more] + [(i, *best.prefix) for i in more if len(best.prefix) == 1]
        looks = search.look(list(dict.fromkeys(longer)))
        tried += looks
        next_best = min(looks, key=lambda look: look.spread)
        if next_best.spread > GAIN * best.spread:
            break
        best = next_best
    return plain, _likeliest(search, tried), len(tried)


def _likeliest(search: Search, looks: Sequence[Look]) -> Look:
    """Of the looks with nearly the least spread the one whose text is likeliest; the first of equals."""
    ranked = sorted(looks, key=lambda look: look.spread)[:FINALISTS]
    close = [look for look in ranked if look.spread <= CLOSE * ranked[0].spread]
    if len(close) == 1:
        return close[0]
    nll = search.likelihoods([look.prefix for look in close])
    return close[int(np.argmin(nll))]


def singles(tokens: TokenBatches, words: Words, config: ModelConfig) -> list[int]:
    """Tokens that sinks are made of, each once: BOS, ends, newline, full stop, the most frequent of the text."""
    marks = [words.encode(mark, add_special_tokens=False) for mark in ("\n", ".")]
    found = [config.bos_token_id, words.bos_id, *config.eos_token_ids, *words.eos_ids]
    found += [ids[0] for ids in marks if len(ids) == 1]
    found.append(int(np.bincount(real_tokens(tokens)).argmax()))
    return list(dict.fromkeys(i for i in found if i is not None and 0 <= i < config.vocab_size))


def real_tokens(tokens: TokenBatches) -> Int:
    """i32[T] of all samples, without padding."""
    return np.concatenate([row[:n] for row, n in zip(tokens.ids, tokens.lengths, strict=True)])


def _told(look: Look) -> str:
    """ "76 times the median token's (model.layers.2 down_in; 4.1 on average)"."""
    name, ratio = largest(look.ratios)
    return f"{ratio:.3g} times the median token's ({name}; {look.spread:.3g} on average)"


def prefix_for(folder: Path, search: Search, wanted: str | Sequence[int]) -> Prefix | None:
    """What the recipe's word asks for: from the run folder where it was found before, else found and kept there."""
    if wanted == "off":
        return None
    found = kept_prefix(folder, wanted, search.source.config)
    if found is None:
        found = find_prefix(search, wanted, search.source.tokenizer())
        save_prefix(place_of(folder, wanted), found)
    return found


def kept_prefix(folder: Path, wanted: str | Sequence[int], config: ModelConfig) -> Prefix | None:
    """What the run folder holds for the recipe's word; None for off, and before it is found."""
    return load_prefix(place_of(folder, wanted), config)


def place_of(folder: Path, wanted: str | Sequence[int]) -> Path:
    return folder / FOLDER / (wanted if isinstance(wanted, str) else "-".join(map(str, wanted)))


def of_model(prefix: Prefix | None, model: ModelSource) -> Prefix | None:
    """The prefix of the source as `model` has it: a rotated model's values are turned, its keys are the same."""
    if prefix is None or not isinstance(model, RotatedSource) or model.values is None:
        return prefix
    return replace(prefix, v=(prefix.v @ model.values.matrix).astype(np.float32))


def folded(prefix: Prefix | None, table: ScaleTable, config: ModelConfig) -> Prefix | None:
    """The prefix behind the transforms of `table`: K and V of every block as its folded weights make them."""
    if prefix is None:
        return None
    blocks = []
    for layer in range(config.num_layers):
        rows = _rows(prefix, layer, tap_factors(layer, table, config), tap_shifts(layer, table, config))
        blocks.append([x.reshape(-1, config.num_kv_heads, config.head_dim).transpose(1, 0, 2) for x in rows.values()])
    k, v = (np.stack(arrays) for arrays in zip(*blocks, strict=True))
    return replace(prefix, k=k, v=v)


def with_prefix(
    seen: dict[str, Statistics],
    prefix: Prefix | None,
    layer: int,
    factors: Mapping[str, Float] | None = None,
    shifts: Mapping[str, Float] | None = None,
) -> dict[str, Statistics]:
    """Statistics of K and V with the prefix's own, as one more batch: the cache holds them under the same scales.

    `factors`, `shifts`: of the transforms that `seen` is behind. Other taps never see the prefix.
    """
    if prefix is None:
        return seen
    rows = {tap: x for tap, x in _rows(prefix, layer, factors or {}, shifts or {}).items() if tap in seen}
    own = {tap: replace(observe(x, seen[tap].rows), live=seen[tap].live) for tap, x in rows.items()}
    return seen | {tap: merge(seen[tap], own[tap]) for tap in own}


def _rows(prefix: Prefix, layer: int, factors: Mapping[str, Float], shifts: Mapping[str, Float]) -> dict[str, Float]:
    """K and V [p, KV*d] of one block, moved and scaled as its transforms do."""
    found = {}
    for tap, heads in (("k", prefix.k[layer]), ("v", prefix.v[layer])):
        x = heads.transpose(1, 0, 2).reshape(len(prefix), -1)
        moved = x - shifts[tap] if tap in shifts else x
        found[tap] = np.ascontiguousarray(moved * factors[tap] if tap in factors else moved)
    return found


def load_prefix(folder: Path, config: ModelConfig) -> Prefix | None:
    """What `save_prefix` left in `folder`, or None. Raises CheckpointError where it is damaged."""
    entry = folder / ENTRY
    return read_prefix(folder, json.loads(entry.read_text("utf-8")), config) if entry.exists() else None


def save_prefix(folder: Path, prefix: Prefix) -> None:
    """The arrays first, then the entry that makes them count."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = write_prefix(folder, prefix)
    write_atomically(folder / ENTRY, json.dumps(entry, ensure_ascii=False).encode())
