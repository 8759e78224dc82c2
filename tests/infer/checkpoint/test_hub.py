"""Hub names are read from the local cache only, and the error says how to fetch."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from quantbench.errors import DependencyError, ModelError
from quantbench.infer.checkpoint.hub import fetch_hub, is_hub_name
from quantbench.infer.checkpoint.source import fetch_model, open_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("text", "is_name"), [("org/model-1.5B", True), ("model", False), ("a/b/c", False), ("./a", False)]
)
def test_what_a_hub_name_is(text, is_name):
    assert is_hub_name(text) == is_name


def test_a_name_that_is_not_cached(cache):
    with pytest.raises(ModelError, match=r"org/model: no such file.*To download it: quantbench fetch org/model$"):
        open_model("org/model")


def test_a_cached_snapshot_opens(cache, make_model):
    revision = "0" * 40
    snapshot = cache / "models--org--model" / "snapshots" / revision
    shutil.copytree(make_model(), snapshot)
    (cache / "models--org--model" / "refs").mkdir()
    (cache / "models--org--model" / "refs" / "main").write_text(revision)
    source = open_model("org/model")
    assert source.name == "org/model"
    assert source.config.hidden_size == json.loads((snapshot / "config.json").read_text())["hidden_size"]


@pytest.mark.parametrize("fetch", [fetch_hub, fetch_model])
def test_a_failed_download_gives_the_reason(cache, fetch):
    with pytest.raises(ModelError, match="org/model: the hub did not give it: "):
        fetch("org/model")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=r"pip install 'quantbench\[hub\]'"):
        open_model("org/model")
