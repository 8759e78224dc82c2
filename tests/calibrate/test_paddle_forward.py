from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantbench.calibrate import paddle_forward
from quantbench.calibrate.forward import ALL_TAPS
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.models import Rope

from .conftest import Decoder, reference_block, tiny_config

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "llama-mha": {"num_kv_heads": 6},
    "llama-linear": {"rope": Rope(kind="linear", factor=4.0)},
    "llama-dynamic": {"rope": Rope(kind="dynamic", factor=2.0, original_max_positions=16)},
    "llama3": {"rope": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)},
    "qwen2": {"family": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 16},
    "mistral": {"family": "mistral", "sliding_window": 7},
    "windowed-layers": {"family": "qwen2", "sliding_window": 5, "windowed_layers": (False, True)},
}


@pytest.mark.parametrize("built", [True, False], ids=["native products", "products of Paddle's"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_plain_forward(name: str, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:  # as in a bare checkout
        monkeypatch.setattr(paddle_forward, "native_ops", lambda: None)
    decoder = Decoder(tiny_config(**FAMILIES[name]))
    forward = decoder.forward()
    hidden = forward.embed(np.random.default_rng(1).integers(0, 97, (2, 37)).astype(np.int32))
    expected = hidden.copy()
    for layer in range(2):
        seen: dict[str, np.ndarray] = {}
        forward.load(layer, decoder.block(layer))
        hidden = forward.run(hidden, np.array([37, 37], np.int32), lambda tap, x, s=seen: s.update({tap: x.copy()}))
        results = [reference_block(decoder.config, layer, decoder.block(layer), x) for x in expected]
        expected = np.stack([out for out, _ in results])
        assert list(seen) == ["attn_in", "k", "v", "o_in", "mlp_in", "down_in"]
        for tap in ALL_TAPS:
            taps = np.concatenate([taps[tap] for _, taps in results])
            np.testing.assert_allclose(seen[tap], taps, rtol=2e-4, atol=2e-5, err_msg=tap)
    np.testing.assert_allclose(hidden, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 3, 150])
def test_attention_in_chunks_equals_attention_at_once(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_config(sliding_window=window))
    forward = decoder.forward()
    forward.load(0, decoder.block(0))
    hidden = np.random.default_rng(0).standard_normal((1, 301, 48)).astype(np.float32)
    chunked = forward.run(hidden, np.array([301], np.int32))
    monkeypatch.setattr(paddle_forward, "QUERY_CHUNK", 1024)
    np.testing.assert_allclose(chunked, forward.run(hidden, np.array([301], np.int32)), rtol=1e-4, atol=1e-5)


def test_padding_is_neither_seen_nor_changes_what_is(decoder: Decoder) -> None:
    forward = decoder.forward()
    forward.load(0, decoder.block(0))
    hidden = np.random.default_rng(0).standard_normal((3, 12, 48)).astype(np.float32)
    lengths = np.array([12, 1, 5], np.int32)
    hidden[1, 1:] = hidden[2, 5:] = 1e9
    seen: dict[str, np.ndarray] = {}
    out = forward.run(hidden, lengths, lambda tap, x: seen.update({tap: x.copy()}))
    assert {tap: len(x) for tap, x in seen.items()} == dict.fromkeys(seen, 18)
    assert max(np.abs(x).max() for x in seen.values()) < 1e3
    for sample, length in enumerate(lengths):
        alone = forward.run(hidden[sample : sample + 1, :length], lengths[sample : sample + 1])
        np.testing.assert_allclose(out[sample, :length], alone[0], rtol=1e-4, atol=1e-5)
        assert not out[sample, length:].any()


def test_a_hook_sees_only_the_taps_it_asked_for(decoder: Decoder) -> None:
    forward = decoder.forward()
    forward.load(0, decoder.block(0))
    seen: list[str] = []
    hidden = np.ones((1, 4, 48), np.float32)
    forward.run(hidden, np.array([4], np.int32), lambda tap, x: seen.append(tap), taps=("o_in", "mlp.up_proj"))
    assert seen == ["o_in", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("tap", "shape"), [("attn_in", (4, 48)), ("k", (4, 2, 8)), ("down_in", (4, 80)), ("mlp.up_proj", (4, 48))]
)
def test_what_a_hook_returns_replaces_the_tap(decoder: Decoder, tap: str, shape: tuple[int, ...]) -> None:
    forward = decoder.forward()
    forward.load(0, decoder.block(0))
    hidden = np.random.default_rng(0).standard_normal((1, 4, 48)).astype(np.float32)
    lengths = np.array([4], np.int32)

    def double(name: str, x: np.ndarray) -> np.ndarray:
        assert x.shape == shape
        return 2 * x

    plain, changed = forward.run(hidden, lengths), forward.run(hidden, lengths, double, (tap,))
    assert np.abs(plain - changed).max() > 1e-3
    np.testing.assert_array_equal(plain, forward.run(hidden, lengths, lambda name, x: x.copy()))


def test_the_head_is_norm_and_projection_and_has_a_tap(decoder: Decoder) -> None:
    hidden = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    scaled = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * decoder.outer["model.norm.weight"]
    forward = decoder.forward()
    logits = forward.head(hidden)
    np.testing.assert_allclose(logits, scaled @ decoder.outer["lm_head.weight"].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(forward.head(hidden, lambda tap, x: x * 0 if tap == "lm_head" else None), 0)


def test_work_on_several_batches_at_once_keeps_their_order(decoder: Decoder) -> None:
    forward = decoder.forward(threads=2)
    forward.load(0, decoder.block(0))
    hidden = np.random.default_rng(0).standard_normal((7, 20, 48)).astype(np.float32)
    lengths = np.full(1, 20, np.int32)
    together = list(forward.each(lambda x: forward.run(x[None], lengths)[0], hidden))
    one_by_one = [forward.run(x[None], lengths)[0] for x in hidden]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_bits_do_not_depend_on_the_number_of_threads(tokens: int) -> None:
    decoder = Decoder(tiny_config(vocab_size=512, hidden_size=64))  # a shape at which shared products differ
    hidden = np.random.default_rng(0).standard_normal((3, tokens, 64)).astype(np.float32)
    lengths = np.array([tokens], np.int32)
    results = []
    for threads in (1, 2, 3):
        forward = decoder.forward(threads=threads)
        forward.load(0, decoder.block(0))
        blocks = list(forward.each(lambda x, f=forward: f.run(x[None], lengths), hidden))
        results.append((np.concatenate(blocks), forward.head(hidden[0])))
    for out, logits in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(logits, results[0][1])


def test_missing_weights_are_all_named(decoder: Decoder) -> None:
    weights = decoder.block(1)
    del weights["mlp.up_proj.weight"], weights["input_layernorm.weight"]
    with pytest.raises(CalibrationError) as error:
        decoder.forward().load(1, weights)
    assert error.value.problems == (
        "model.layers.1.input_layernorm.weight: needed by the forward, not given",
        "model.layers.1.mlp.up_proj.weight: needed by the forward, not given",
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "windowed-layers", "llama3"])
@pytest.mark.parametrize("length", [1, 9])
def test_behind_a_prefix_is_behind_its_tokens(name: str, length: int) -> None:
    decoder, ids = Decoder(tiny_config(**FAMILIES[name])), np.random.default_rng(1).integers(0, 97, (2, 150))
    ids[1, :length] = ids[0, :length]
    plain, ids = decoder.forward(), ids.astype(np.int32)
    whole, kept = plain.embed(ids), list[np.ndarray]()
    for layer in range(2):
        seen: dict[str, np.ndarray] = {}
        plain.load(layer, decoder.block(layer))
        whole = plain.run(whole, np.array([150, 120], np.int32), lambda tap, x, s=seen: s.update({tap: x.copy()}))
        kept.append(np.stack([seen[tap][:length].transpose(1, 0, 2) for tap in ("k", "v")]))
    k, v = np.stack(kept, axis=1)
    forward = plain.behind(Prefix(tuple(ids[0, :length].tolist()), k, v))
    hidden = forward.embed(ids[:, length:])
    for layer in range(2):
        forward.load(layer, decoder.block(layer))
        hidden = forward.run(hidden, np.array([150, 120], np.int32) - length)
    np.testing.assert_allclose(hidden, whole[:, length:], rtol=1e-4, atol=2e-5)


def test_no_prefix_changes_nothing(decoder: Decoder) -> None:
    forward, lengths = decoder.forward(), np.array([20], np.int32)
    hidden = np.random.default_rng(0).standard_normal((1, 20, 48)).astype(np.float32)
    other = forward.behind(None)
    for each in (forward, other):
        each.load(0, decoder.block(0))
    np.testing.assert_array_equal(forward.run(hidden, lengths), other.run(hidden, lengths))
