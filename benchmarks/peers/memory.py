"""The most memory this process ever held, in MB: what peers print beside their speed."""

from __future__ import annotations

from pathlib import Path


def peak_rss_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))
