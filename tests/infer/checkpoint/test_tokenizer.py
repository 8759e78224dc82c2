"""Text to ids and back, streaming, chats, and the files a tokenizer carries."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantbench.errors import ModelError, RequestError
from quantbench.infer.checkpoint.chat import render_chat
from quantbench.infer.checkpoint.tokenizer import Tokenizer

from .conftest import TEMPLATE


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    return Tokenizer(
        {"tokenizer.json": tokenizer_json.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=30))
def test_streaming_gives_the_same_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    stream = tokenizer.stream(skip_special_tokens=False)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("x🙂"[:1]) + tokenizer.encode("🚀")  # a rocket is four byte tokens here
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert pieces[-1] == "🚀"
    assert set(pieces[1:-1]) == {""}
    broken = tokenizer.stream()
    assert [broken.push(i) for i in ids[:-1]][1:] == [""] * (len(ids) - 2)
    assert broken.finish().endswith("\ufffd")


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert tokenizer.token(1) == "</s>"
    assert tokenizer.token(10**6) == ""
    assert tokenizer.token(tokenizer.vocab_size - 1) != ""
    assert tokenizer.token(tokenizer.vocab_size) == ""
    assert tokenizer.decode([2, *tokenizer.encode("fox"), 1]) == "fox"
    assert tokenizer.stream().push(1) == ""


def test_given_end_tokens_come_first(tokenizer_json):
    tokenizer = Tokenizer({"tokenizer.json": tokenizer_json.encode()}, bos_id=5, eos_ids=(7, 1))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (5, (7, 1))


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "the fox"}]
    assert tokenizer.has_chat_template
    assert tokenizer.render(messages) == "<|user|>the fox</s><|assistant|>"
    assert tokenizer.render(messages, add_generation_prompt=False) == "<|user|>the fox</s>"
    ids = tokenizer.chat(messages)
    assert ids[0] == 2
    assert ids[-1] == 3


def test_a_model_without_template(tokenizer_json):
    plain = Tokenizer({"tokenizer.json": tokenizer_json.encode()})
    assert not plain.has_chat_template
    with pytest.raises(RequestError, match="this model has no chat template"):
        plain.chat([])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "J{{ bos_token }}"),
        ("chat_template.json", json.dumps({"chat_template": "J{{ bos_token }}"})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "J{{ bos_token }}"}]})),
    ],
)
def test_where_templates_lie(tokenizer_json, name, content):
    tokenizer = Tokenizer({"tokenizer.json": tokenizer_json.encode(), name: content.encode()})
    assert tokenizer.render([]) == "J"


def test_templates_run_in_a_sandbox():
    with pytest.raises(RequestError, match=r"the model's chat template refuses these messages: .*unsafe"):
        render_chat("{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", {})


def test_what_templates_expect():
    assert render_chat("{{ x | tojson }}", {"x": {"a": "<é>"}}) == '{"a": "<é>"}'
    assert render_chat("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "1"
    assert len(render_chat("{{ strftime_now('%Y') }}", {})) == 4


def test_a_directory_round_trip(make_model, tmp_path):
    directory = make_model()
    first = Tokenizer.from_directory(directory)
    target = tmp_path / "copy"
    target.mkdir()
    first.save(target)
    assert (target / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert Tokenizer.from_directory(target).encode("the fox") == first.encode("the fox")


def test_unreadable_tokenizers(make_model):
    directory = make_model()
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer files cannot be read"):
        Tokenizer.from_directory(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is absent; only fast tokenizers are read"):
        Tokenizer.from_directory(directory)
