from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantbench.calibrate.hidden import HiddenStates
from quantbench.errors import CalibrationError

LENGTHS = np.array([4, 2, 3], np.int32)
SHAPE = (3, 4, 5)


def states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["spilled", "in memory"])
def test_what_is_written_is_read_back_and_survives(tmp_path: Path, limit: int) -> None:
    hidden = HiddenStates.start(states(), LENGTHS, tmp_path, limit)
    assert hidden.in_memory == bool(limit)
    after = hidden.following()
    for samples in hidden.batches(2):
        after.write(samples.start, hidden.read(samples) + 1)
    assert HiddenStates.resume(LENGTHS, SHAPE, tmp_path, limit).layer == 0  # not committed yet
    after.commit()
    resumed = HiddenStates.resume(LENGTHS, SHAPE, tmp_path, limit)
    assert resumed is not None
    assert resumed.layer == 1
    np.testing.assert_array_equal(resumed.read(slice(0, 3)), states() + 1)
    np.testing.assert_array_equal(resumed.read(slice(1, 2)), states()[1:2] + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["hidden_00001.f32"]


def test_without_a_folder_everything_stays_in_memory() -> None:
    hidden = HiddenStates.start(states(), LENGTHS)
    after = hidden.following()
    after.write(0, hidden.read(slice(0, 3)))
    after.commit()
    np.testing.assert_array_equal(after.read(slice(2, 3)), states()[2:])


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert HiddenStates.resume(LENGTHS, SHAPE, tmp_path / "absent") is None
    assert HiddenStates.resume(LENGTHS, SHAPE, tmp_path) is None


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    HiddenStates.start(states(), LENGTHS, tmp_path)
    with pytest.raises(CalibrationError, match=r"240 bytes, but .* \[3, 4, 6\] take 288\. .* start without --resume"):
        HiddenStates.resume(LENGTHS, (3, 4, 6), tmp_path)


def test_a_half_written_file_is_ignored_and_written_anew(tmp_path: Path) -> None:
    hidden = HiddenStates.start(states(), LENGTHS, tmp_path, 0)
    hidden.following().write(0, states(9)[:2])  # the process dies here
    resumed = HiddenStates.resume(LENGTHS, SHAPE, tmp_path, 0)
    assert resumed is not None
    after = resumed.following()
    after.write(0, states(1))
    after.commit()
    np.testing.assert_array_equal(after.read(slice(0, 3)), states(1))


KILLED = """
import sys, numpy as np
from pathlib import Path
from quantbench.calibrate.hidden import HiddenStates
work, lengths = Path(sys.argv[1]), np.full(64, 32, np.int32)
hidden = HiddenStates.start(np.zeros((64, 32, 64), np.float32), lengths, work, int(sys.argv[2]))
print("ready", flush=True)
while True:
    after = hidden.following()
    for s in hidden.batches(16):
        after.write(s.start, hidden.read(s) + 1)
    after.commit()
    hidden = after
"""


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["spilled", "in memory"])
def test_a_process_killed_at_any_moment_leaves_whole_states(tmp_path: Path, limit: int) -> None:
    for delay in (0.02, 0.05, 0.081):
        work = tmp_path / str(delay)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(work), str(limit)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        hidden = HiddenStates.resume(np.full(64, 32, np.int32), (64, 32, 64), work, limit)
        assert hidden is not None
        np.testing.assert_array_equal(hidden.read(slice(0, 64)), np.float32(hidden.layer))


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["spilled", "in memory"])
def test_the_next_block_reads_and_begins_its_own_before_the_commit(tmp_path: Path, limit: int) -> None:
    first = HiddenStates.start(states(), LENGTHS, tmp_path, limit)
    second = first.following()
    second.write(0, states(1))
    np.testing.assert_array_equal(second.read(slice(1, 3)), states(1)[1:])
    third = second.following()
    third.write(0, states(2))
    second.commit()
    np.testing.assert_array_equal(second.read(slice(0, 3)), states(1))
    np.testing.assert_array_equal(third.read(slice(0, 3)), states(2))
    third.commit()
    np.testing.assert_array_equal(third.read(slice(0, 3)), states(2))
    assert [p.name for p in tmp_path.iterdir()] == ["hidden_00002.f32"]
