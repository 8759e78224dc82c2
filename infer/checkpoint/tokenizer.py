"""Text to ids and back: a `tokenizers.Tokenizer` with the directory's special tokens and chat template.

A tokenizer carries the files it came from, so that a checkpoint stores them unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from quantbench.errors import ModelError, RequestError

# What else a HF directory may hold about its tokenizer; copied as it is.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """Encodes, decodes and renders chats. `files` maps file name -> bytes, tokenizer.json among them."""

    def __init__(self, files: Mapping[str, bytes], bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> None:
        self._files = dict(files)
        self._fast = FastTokenizer.from_str(self._files["tokenizer.json"].decode("utf-8"))
        self._settings: dict[str, Any] = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        self._template = _template_of(self._files, self._settings)
        self.bos_id = bos_id if bos_id is not None else self._id_of("bos_token")
        named = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids + (() if named is None else (named,))))

    @classmethod
    def from_directory(cls, path: Path, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
        """The tokenizer of a HF directory. Raises ModelError where tokenizer.json is absent or unreadable."""
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).exists()}
        if "tokenizer.json" not in files:
            raise ModelError(
                f"{path}: tokenizer.json is absent; only fast tokenizers are read. Save one beside the model"
            )
        try:
            return cls(files, bos_id, eos_ids)
        except Exception as reason:  # tokenizers raises bare Exception for a file it cannot parse
            if type(reason) is not Exception and not isinstance(reason, ValueError):
                raise
            raise ModelError(f"{path}: the tokenizer files cannot be read ({reason}). Copy them again") from None

    @property
    def vocab_size(self) -> int:
        """Ids below this have a token; a model's embedding may be padded beyond it."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens`: with what the tokenizer puts around it (Llama 3: a BOS; Qwen: none)."""
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, index: int) -> str:
        """The token's own spelling (bytes as the vocabulary writes them), or "" where the id has none."""
        return self._fast.id_to_token(index) or ""

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        return TokenStream(self, skip_special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """`messages` ({"role", "content"}) as the text the model was trained on, by its own Jinja template."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template (tokenizer_config.json: chat_template). Give plain text"
            )
        from quantbench.infer.checkpoint.chat import render_chat

        special = {
            k: _spelling(self._settings.get(k)) or "" for k in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        values = special | {"messages": list(messages), "add_generation_prompt": add_generation_prompt} | extra
        return render_chat(self._template, values)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Ids of the rendered chat; the template writes the special tokens, so none are added."""
        return self.encode(self.render(messages, add_generation_prompt, **extra), add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files, byte for byte as they were read."""
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def _id_of(self, key: str) -> int | None:
        text = _spelling(self._settings.get(key))
        return None if text is None else self._fast.token_to_id(text)


class TokenStream:
    """Text of a growing list of ids. A piece is released once no later token can change it.

    `push(id)` returns what became certain: "" while a multi-byte character is incomplete. Each push decodes only the
    ids since the last release (and those released just before, whose presence decides about leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0  # of self._ids, how many have been released

    def push(self, index: int) -> str:
        self._ids.append(index)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        now = self._tokenizer.decode(self._ids, self._skip)
        if not final and now.endswith(_REPLACEMENT):
            return ""
        if len(now) <= len(before):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(before) :]


def _spelling(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template_of(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    if "chat_template.json" in files:
        return str(json.loads(files["chat_template.json"])["chat_template"])
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates: the one called "default"
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
