from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.errors import CheckpointError
from quantbench.reports.arrays import bytes_by_kind, percentile, read_stream, read_table
from quantbench.scales.statistics import load, observe, save


@given(st.integers(0, 2**32 - 1), st.integers(10, 5000), st.floats(1e-3, 1e3))
def test_percentile_is_an_upper_bound_within_one_bin(seed: int, count: int, spread: float) -> None:
    x = (spread * np.random.default_rng(seed).standard_normal((count, 1))).astype(np.float32)
    seen = observe(x)
    assert seen.histogram is not None
    below = percentile(seen.histogram, seen.limit, seen.absmax)[0]
    exact = np.sort(np.abs(x).ravel())[int(np.ceil(0.999 * count)) - 1]
    assert exact <= below * (1 + 1e-6)
    assert below <= exact + seen.limit[0] / 2048 * (1 + 1e-6)
    assert below <= seen.absmax[0]


def test_percentile_of_zeros_is_zero() -> None:
    seen = observe(np.zeros((8, 4), np.float32))
    assert seen.histogram is not None
    assert percentile(seen.histogram, seen.limit, seen.absmax).tolist() == [0.0]


def test_percentile_of_one_huge_outlier_ignores_it() -> None:
    x = np.ones((5000, 1), np.float32)
    x[3] = 4000
    seen = observe(x)
    assert seen.histogram is not None
    assert percentile(seen.histogram, seen.limit, seen.absmax)[0] == 2  # the upper edge of a bin 4096/2048 wide


def test_a_stream_is_what_statistics_saved(sample: Path) -> None:
    taps = read_stream(sample / "statistics")
    assert sorted(taps) == list(range(30))
    truth = load(sample / "statistics" / "block_00011.safetensors")
    for tap, seen in truth.items():
        assert np.array_equal(taps[11][tap].absmax, seen.absmax)
        assert np.array_equal(taps[11][tap].channel_absmax, seen.channel_absmax)
        assert taps[11][tap].tokens == seen.tokens


def test_statistics_without_a_histogram_have_no_percentile(tmp_path: Path) -> None:
    seen = observe(np.ones((4, 4), np.float32))
    seen.histogram = None
    save(tmp_path / "block_00000.safetensors", {"attn_in": seen})
    assert read_stream(tmp_path)[0]["attn_in"].p999 is None


def test_hessians_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantbench.reports import arrays

    save(tmp_path / "block_00000.safetensors", {"attn_in": observe(np.ones((4, 4), np.float32), hessian=True)})
    read: list[str] = []
    original = arrays._read_arrays

    def spy(path: Path, stage: str, wanted: object) -> dict[str, np.ndarray]:
        found = original(path, stage, wanted)  # type: ignore[arg-type]
        read.extend(found)
        return found

    monkeypatch.setattr(arrays, "_read_arrays", spy)
    read_stream(tmp_path)
    assert read
    assert not [key for key in read if "hessian" in key]


def test_damaged_statistics_are_all_named(scratch: Path) -> None:
    folder = scratch / "statistics"
    (folder / "block_00003.safetensors").write_bytes(b"\x00" * 20)
    (folder / "block_x.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        read_stream(folder)
    text = str(caught.value)
    assert "block_00003.safetensors: not a safetensors file" in text
    assert "--from collect" in text
    assert "block_x.safetensors: expected a name like block_00012.safetensors; remove it" in text


def test_statistics_without_ranges_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"attn_in/tokens": np.array([4])}, tmp_path / "block_00000.safetensors")
    with pytest.raises(CheckpointError, match="attn_in/absmax: absent; write it again") as caught:
        read_stream(tmp_path)
    assert len(caught.value.problems) == 2


def test_a_table_of_another_run_is_refused(scratch: Path) -> None:
    folder = scratch / "scales" / "a8w8"
    other = scratch / "scales" / "a8w8_fp8" / "scales.safetensors"
    (folder / "scales.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"not the file that scales\.json describes \(sha256 differs\)"):
        read_table(folder)


def test_a_table_without_its_arrays_is_refused(scratch: Path) -> None:
    folder = scratch / "scales" / "a8w8"
    (folder / "scales.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"scales\.safetensors: absent; write it again .*--from choose"):
        read_table(folder)


def test_bytes_by_kind(sample: Path) -> None:
    assert bytes_by_kind(sample / "checkpoint" / "fp32") == {
        "embedding": 64 * 48 * 4,
        "attention": 48 * 48 * 4,
        "feed-forward": 48 * 96 * 4,
        "norms": 48 * 4,
    }


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}x", b"\x01\x00\x00\x00\x00\x00\x00\x00["]
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    if content.endswith(b"{}x"):
        assert bytes_by_kind(tmp_path) == {}
        return
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file; write it again"):
        bytes_by_kind(tmp_path)
