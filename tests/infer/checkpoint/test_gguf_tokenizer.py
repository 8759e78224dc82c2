"""Tokenizers rebuilt from metadata give the ids of the tokenizers they came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files

from .gguf_files import byte_level_fields

HERE = Path("m.gguf")
CORPUS = ["the quick brown fox jumps over the lazy dog, and the other foxes think 12345 things"] * 5


def rebuilt(fields) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(HERE, fields)["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def byte_level(tokenizer_json, tmp_path_factory) -> tuple[dict, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(tokenizer_json)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": ""}))
    return byte_level_fields(directory), Tokenizer.from_str(tokenizer_json)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_byte_level_ids(byte_level, text):
    fields, original = byte_level
    assert rebuilt(fields).encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(byte_level, pre):
    fields = byte_level[0] | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    text = "It's 1234 o'clock,\r\n\n  naïve 🙂\tx = y+1 "
    tokenizer = rebuilt(fields)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("gpt-2", "a 123", ["a", "Ġ123"]),
        ("qwen2", "it's 123", ["it", "'s", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "it's 12345", ["it", "'s", "Ġ", "123", "45"]),
    ],
)
def test_how_words_are_cut(byte_level, pre, text, words):
    pre_tokenizer = rebuilt(byte_level[0] | {"tokenizer.ggml.pre": pre}).pre_tokenizer
    assert [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] == words


def test_beginning_of_text(byte_level):
    fields = byte_level[0]
    assert rebuilt(fields).encode("x").ids[0] != 0
    assert rebuilt(fields | {"tokenizer.ggml.add_bos_token": True}).encode("x").ids[0] == 0
    assert rebuilt(fields | {"tokenizer.ggml.pre": "llama-bpe"}).encode("x").ids[0] == 0


def test_user_defined_tokens_stay_in_the_text(byte_level):
    fields = dict(byte_level[0])
    types = list(fields["tokenizer.ggml.token_type"])
    types[2] = 4
    tokenizer = rebuilt(fields | {"tokenizer.ggml.token_type": types})
    assert tokenizer.decode([2, 3]) == "<|user|>"


@pytest.fixture(scope="module")
def sentencepiece() -> tuple[dict, Tokenizer]:
    """A BPE with ▁ for spaces and byte fallback, and the metadata a SentencePiece file of it has: scores = -rank."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    vocab = document["model"]["vocab"]
    tokens = sorted(vocab, key=lambda t: vocab[t])
    types = [2 if t == "<unk>" else 3 if t in special[1:3] else 6 if t in special[3:] else 1 for t in tokens]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    return fields, tokenizer


@settings(max_examples=50, deadline=None)
@given(text=st.text("the quickbrownfx 123é🙂", max_size=30))
def test_sentencepiece_ids(sentencepiece, text):
    fields, original = sentencepiece
    ids = rebuilt(fields).encode(text).ids
    assert ids == original.encode(text).ids
    assert rebuilt(fields).decode(ids) == original.decode(ids) == text


def test_sentencepiece_begins_with_its_token_unless_told_not_to(sentencepiece):
    fields = {k: v for k, v in sentencepiece[0].items() if k != "tokenizer.ggml.add_bos_token"}
    assert rebuilt(fields).encode("the").ids[0] == 1
    plain = rebuilt(sentencepiece[0] | {"tokenizer.ggml.add_space_prefix": False})
    assert plain.encode("the").tokens[0][0] == "t"
    assert plain.decode(plain.encode(" the").ids) == " the"


def test_unknown_kinds(byte_level):
    with pytest.raises(ModelError, match=r"m\.gguf: unknown tokenizer\.ggml\.model 'bert'. Known: gpt2, llama"):
        tokenizer_files(HERE, byte_level[0] | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(ModelError, match=r"unknown tokenizer\.ggml\.pre 'qwen3'. Did you mean qwen2"):
        tokenizer_files(HERE, byte_level[0] | {"tokenizer.ggml.pre": "qwen3"})
