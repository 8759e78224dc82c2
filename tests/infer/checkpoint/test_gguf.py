"""GGUF files equal the HF directory they were converted from: tensors, configuration, token ids."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.gguf import TYPES, half_split
from quantbench.infer.checkpoint.source import open_model

from .gguf_files import interleaved, write_gguf

FAMILIES = {
    "llama": {},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
SETTABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_hf_directory(make_model, tmp_path, family, tied):
    hf = open_model(make_model(**FAMILIES[family], tie_word_embeddings=tied))
    source = open_model(write_gguf(tmp_path / "m.gguf", hf.path))
    assert source.config == hf.config
    assert source.names() == hf.names()
    assert all(np.array_equal(source.read(name), hf.read(name)) for name in hf.names())
    text = "the quick fox </s>\n 12 naïve 🙂"
    assert source.tokenizer().encode(text) == hf.tokenizer().encode(text)
    assert source.tokenizer().chat([{"role": "user", "content": text}]) == hf.tokenizer().chat(
        [{"role": "user", "content": text}]
    )


@pytest.mark.parametrize("kind", SETTABLE)
def test_every_type_that_can_be_written(make_model, tmp_path, kind):
    hf = open_model(make_model())
    source = open_model(write_gguf(tmp_path / "m.gguf", hf.path, kind))
    qtype = gguf.GGMLQuantizationType[kind]
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"):
        expected = dequantize(quantize(hf.read(name), qtype), qtype)
        assert np.array_equal(source.read(name), expected)
        assert source.read(name).dtype == np.float32
    assert source.config.dtype == {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.endswith("_K")])
def test_k_quants(make_model, tmp_path, kind):
    """The library cannot write K-quants, so their bytes are random; both sides must read the same numbers."""
    hf = open_model(make_model(hidden_size=256, intermediate_size=256))
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (256, 256 // block * size), np.uint8)  # small bytes keep the float16 scales finite
    path = write_gguf(tmp_path / "m.gguf", hf.path, tensors={"blk.0.ffn_up.weight": None})
    add_raw(path, tmp_path / "k.gguf", "blk.0.ffn_up.weight", raw, qtype)
    values = open_model(tmp_path / "k.gguf").read("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(values, dequantize(raw, qtype))
    assert np.isfinite(values).all()
    assert values.shape == (256, 256)


def add_raw(path, target, name, raw, qtype):
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, raw, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_half_split_undoes_the_interleaving():
    w = np.arange(2 * 8 * 3).reshape(16, 3)
    assert np.array_equal(half_split(interleaved(w, 2), 2), w)
    assert np.array_equal(half_split(np.array([0, 4, 1, 5, 2, 6, 3, 7]), 1), np.arange(8))


def test_the_better_copy_of_a_tied_embedding(make_model, tmp_path):
    hf = open_model(make_model())
    exact = hf.read("model.embed_tokens.weight")
    blurred = (exact + np.float32(1e-4)).astype(np.float32)
    source = open_model(
        write_gguf(tmp_path / "m.gguf", hf.path, tensors={"token_embd.weight": blurred, "output.weight": exact})
    )
    assert source.config.tie_word_embeddings
    assert source.names() == hf.names()
    assert np.array_equal(source.read("model.embed_tokens.weight"), exact)


def test_a_head_of_its_own_stays_apart(make_model, tmp_path):
    hf = open_model(make_model())
    head = np.random.default_rng(5).standard_normal((320, 64)).astype(np.float32)
    source = open_model(write_gguf(tmp_path / "m.gguf", hf.path, tensors={"output.weight": head}))
    assert not source.config.tie_word_embeddings
    assert np.array_equal(source.read("lm_head.weight"), head)


def test_everything_wrong_is_listed(make_model, tmp_path):
    change = {"blk.0.attn_q.weight": None, "blk.1.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    with pytest.raises(ModelError) as refused:
        open_model(write_gguf(tmp_path / "m.gguf", make_model(), tensors=change))
    text = str(refused.value)
    assert "tensor model.layers.0.self_attn.q_proj.weight is missing; expected shape [64, 64]" in text
    assert "tensor blk.1.ffn_gate_inp.weight is not part of this architecture" in text


def test_not_a_gguf_file(make_model, tmp_path):
    (tmp_path / "text.gguf").write_text("hello, this is no model")
    with pytest.raises(ModelError, match="not a GGUF file, or truncated"):
        open_model(tmp_path / "text.gguf")
    path = write_gguf(tmp_path / "m.gguf", make_model())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="not a GGUF file, or truncated"):
        open_model(path)


def test_unknown_architecture_and_type(make_model, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "lama")
    writer.add_tensor("x", np.zeros((1, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"unknown GGUF architecture 'lama'\. Did you mean llama"):
        open_model(tmp_path / "a.gguf")
    path = write_gguf(tmp_path / "b.gguf", make_model(), tensors={"x": None})
    qtype = gguf.GGMLQuantizationType.IQ4_NL
    add_raw(path, tmp_path / "c.gguf", "extra", np.zeros((1, 18), np.uint8), qtype)
    with pytest.raises(ModelError, match=r"tensor types IQ4_NL are not supported\. Known: F32, F16"):
        open_model(tmp_path / "c.gguf")


def test_the_hash_is_the_files(make_model, tmp_path):
    path = make_model()
    one = open_model(write_gguf(tmp_path / "m.gguf", path))
    two = open_model(write_gguf(tmp_path / "m2.gguf", path, fields={"general.name": "x"}))
    assert one.sha256() != two.sha256()
    assert replace(one).sha256() == one.sha256()
