"""HF tokenizer files rebuilt from GGUF metadata.

Two kinds exist. `gpt2`: byte-level BPE with its merges listed, and a pre-tokenizer known by name. `llama`:
SentencePiece BPE, which lists scores instead of merges; the merges are all splits of a token into two tokens, in the
order of the token's score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantbench.errors import ModelError, unknown

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> Any:
    pattern = Regex("|".join((_CONTRACTIONS, _WORDS, numbers, _REST)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def _gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm(tokenizer: Tokenizer) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split(r"\p{N}")


def _llama3(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = _split(r"\p{N}{1,3}")
    tokenizer.model.ignore_merges = True  # a word that is a token is taken whole


PRE_TOKENIZERS: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "qwen2": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}


def tokenizer_files(path: Path, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a GGUF file. Raises ModelError for a kind that is not known."""
    kind = fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(f"{path}: " + unknown("tokenizer.ggml.model", str(kind), builders))
    tokenizer, add_bos = builders[kind](path, fields)
    _add_tokens(tokenizer, fields)
    if fields.get("tokenizer.ggml.add_bos_token", add_bos):
        _prepend_bos(tokenizer, fields)
    settings = json.dumps(_settings(fields), indent=2, ensure_ascii=False)
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": settings.encode()}


def _byte_level(path: Path, fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    pre = str(fields.get("tokenizer.ggml.pre", "gpt-2"))
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"{path}: " + unknown("tokenizer.ggml.pre", pre, PRE_TOKENIZERS))
    types = fields["tokenizer.ggml.token_type"]
    # Rows of type "unused" pad the embedding to a round size; no text is theirs.
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"]) if types[i] != _UNUSED}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    PRE_TOKENIZERS[pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.startswith("llama")


def _sentencepiece(path: Path, fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, types, fields["tokenizer.ggml.scores"])
    unknown_token = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown_token)
    )
    space = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True


def _merges(vocab: Mapping[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every normal token into two tokens; a better score first, earlier parts first among equals."""
    found = []
    for token, index in vocab.items():
        if types[index] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right, (token[:cut], token[cut:])))
    return [entry[-1] for entry in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    pairs = list(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    added = {_CONTROL: True, _USER_DEFINED: False}  # type -> special, i.e. left out of decoded text
    tokenizer.add_tokens([AddedToken(t, special=added[kind], normalized=False) for t, kind in pairs if kind in added])


def _prepend_bos(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    index = fields["tokenizer.ggml.bos_token_id"]
    token = fields["tokenizer.ggml.tokens"][index]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: fields.get(f"tokenizer.ggml.{kind}_token_id") for key, kind in kinds.items()}
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    found |= {key: tokens[index] for key, index in ids.items() if index is not None}
    template = fields.get("tokenizer.chat_template")
    return found | ({"chat_template": template} if template else {})
