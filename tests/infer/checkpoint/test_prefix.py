"""A prefix in a checkpoint: written, read back, and refused where it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.inspect import describe
from quantbench.infer.checkpoint.lint import lint_checkpoint
from quantbench.infer.checkpoint.prefix import FILE, KEY, Prefix, read_prefix, write_prefix
from quantbench.infer.checkpoint.source import file_sha256, open_model
from quantbench.infer.checkpoint.write import CheckpointWriter

from .conftest import block_of, table_of, variant_of

SHAPE = (2, 2, 3, 16)  # layers, KV heads, tokens, head_dim of the models here


def some_prefix() -> Prefix:
    k, v = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    return Prefix((5, 0, 7), k, v, "why")


@pytest.fixture(params=["a8w8c8", "fp32"])
def checkpoint(request, make_model, tmp_path) -> Path:
    """A checkpoint with a prefix, quantized or float."""
    source = open_model(make_model())
    variant = variant_of(request.param, source)
    writer, table = CheckpointWriter(tmp_path / "checkpoint", source, variant), table_of(source, variant)
    for layer in range(2):
        writer.add_block(layer, block_of(source, variant, table, layer))
    return writer.finish(table, some_prefix())


def edit_entry(path: Path, **changes: object) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    config[KEY] = changes.pop("entry", config[KEY] | changes)
    file.write_text(json.dumps(config))


def rewrite(path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, path / FILE)
    edit_entry(path, sha256=file_sha256(path / FILE))


def test_it_comes_back_bit_for_bit(checkpoint: Path) -> None:
    read, wrote = open_model(checkpoint).prefix, some_prefix()
    assert read is not None
    assert (read.ids, read.reason, len(read)) == ((5, 0, 7), "why", 3)
    np.testing.assert_array_equal(read.k, wrote.k)
    np.testing.assert_array_equal(read.v, wrote.v)
    assert [f for f in lint_checkpoint(checkpoint) if f.severity == "error"] == []


def test_other_readers_see_a_checkpoint_like_any_other(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert FILE not in index["weight_map"].values()
    config = json.loads((checkpoint / "config.json").read_text())
    assert KEY not in config.get("quantization_config", {})
    assert set(load_file(checkpoint / FILE)) == {"k", "v"}
    plain = replace(open_model(checkpoint), prefix=None)
    assert set(plain.names()) == set(index["weight_map"])


def test_the_same_prefix_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    entries = [write_prefix(folder, some_prefix()) for folder in folders]
    assert entries[0] == entries[1]
    assert (folders[0] / FILE).read_bytes() == (folders[1] / FILE).read_bytes()


@pytest.mark.parametrize("checkpoint", ["fp32"], indirect=True)
def test_a_model_made_from_it_does_not_inherit_it(checkpoint: Path, tmp_path: Path) -> None:
    source = open_model(checkpoint)
    variant = variant_of("bf16", source)
    writer, table = CheckpointWriter(tmp_path / "second", source, variant), table_of(source, variant)
    for layer in range(2):
        writer.add_block(layer, block_of(source, variant, table, layer))
    assert open_model(writer.finish(table)).prefix is None


def spoil(path: Path, how: str) -> None:
    good = {name: value.copy() for name, value in load_file(path / FILE).items()}
    if how == "absent":
        (path / FILE).unlink()
    elif how == "one bit":
        raw = bytearray((path / FILE).read_bytes())
        raw[-1] ^= 1
        (path / FILE).write_bytes(raw)
    elif how == "cut":
        (path / FILE).write_bytes((path / FILE).read_bytes()[:-8])
    elif how == "no v":
        rewrite(path, {"k": good["k"]})
    elif how == "shape":
        rewrite(path, {"k": good["k"][:, :, :2].copy(), "v": good["v"].astype(np.float16), "x": good["k"]})
    elif how == "NaN":
        good["k"][0, 0, 0, 0] = np.nan
        rewrite(path, good)
    elif how == "entry":
        edit_entry(path, entry=["x"])
    elif how == "ids":
        edit_entry(path, token_ids=[1, 320, True], file="other.safetensors")
    elif how == "long":
        edit_entry(path, token_ids=[1] * 256)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("absent", [f"{FILE}: absent, but config.json says that the model has a prefix. Copy it again"]),
        ("one bit", ["its bytes are not those that were written (sha256). Copy it again"]),
        ("cut", ["truncated"]),
        ("no v", ["tensor v is missing. Copy it again"]),
        (
            "shape",
            [
                "tensor k is float32 [2, 2, 2, 16], expected float32 [2, 2, 3, 16]",
                "tensor v is float16 [2, 2, 3, 16], expected float32 [2, 2, 3, 16]",
                "tensor x is unknown",
            ],
        ),
        ("NaN", ["has NaN or infinite values. Calibrate again"]),
        ("entry", [f"{KEY}: not an object with token_ids, file and sha256. Copy it again"]),
        (
            "ids",
            [
                "token_ids: [1, 320, True] are not ids of the vocabulary of 320",
                f"file: 'other.safetensors', allowed: {FILE}",
            ],
        ),
        ("long", ["256 tokens leave nothing of the model's 256 positions"]),
    ],
)
def test_damage_is_one_error_that_lint_tells_too(how: str, says: list[str], checkpoint: Path) -> None:
    spoil(checkpoint, how)
    with pytest.raises(CheckpointError) as caught:
        open_model(checkpoint)
    assert len(caught.value.problems) == len(says)
    for problem, said in zip(caught.value.problems, says, strict=True):
        assert said in problem
    assert [f.severity for f in lint_checkpoint(checkpoint)] == ["error"] * len(says)


def test_inspect_names_its_tokens(checkpoint: Path) -> None:
    (row,) = [row for row in describe(checkpoint) if row.name == "prefix"]
    assert (row.inputs, row.shape, row.bytes) == ("token ids 5, 0, 7", SHAPE, 2 * 4 * 2 * 2 * 3 * 16)


def test_an_entry_is_read_on_its_own(tmp_path: Path, make_model) -> None:
    config = open_model(make_model()).config
    entry = write_prefix(tmp_path, some_prefix())
    assert read_prefix(tmp_path, entry, config).ids == (5, 0, 7)
