"""Bytes of a mixture: what a head costs that is the embedding, and one that is not."""

from __future__ import annotations

from pathlib import Path

from quantbench.mixture import Mixture
from quantbench.pipeline import Options, load
from tests.tiny import write_tiny_model

RECIPE = "model: {model}\nmodes: [weight_only_int8]\ntransforms: [{words}]\noutput: {output}\n"


def mixture(folder: Path, words: str) -> Mixture:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=folder / "model", words=words, output=folder / "run"))
    run = load(str(recipe), Options())
    return Mixture(folder / "run", run, run.plan.variants)


def test_a_rotated_models_head_takes_bytes_of_its_own(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    tied, turned = (mixture(tmp_path, words) for words in ("", "rotate"))
    head = tied.groups[-1]
    assert tied.bytes_of("weight_only_int8", head) == tied.float_bytes(head) == 0
    assert turned.bytes_of("weight_only_int8", head) == turned.float_bytes(head) == 512 * 64 * 2
    assert turned.fixed_bytes == tied.fixed_bytes
    assert turned.whole_bytes - tied.whole_bytes == 512 * 64 * 2
