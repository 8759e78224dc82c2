"""The arrows between the folders, as docs/architecture.md draws them, held by reading the code's own imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"errors", "registry", "vocabulary"}
ALLOWED = {
    "scales": BASE | {"scales"},
    "quantizers": BASE | {"scales", "quantizers"},
    "infer": BASE | {"scales", "quantizers", "infer", "_kernels"},
    "calibrate": BASE | {"scales", "quantizers", "infer", "calibrate", "_kernels"},
    "recipes": BASE | {"recipes"},
    "reports": {"errors", "reports"},
}
PADDLE_ONLY_IN = {"calibrate", "quantizers"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_its_arrow_allows(folder: str) -> None:
    assert sources(folder), f"{folder}/ is empty"
    for path in sources(folder):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("quantbench.")}
        assert ours <= ALLOWED[folder] | {"__version__"}, f"{path.relative_to(ROOT)} imports {ours - ALLOWED[folder]}"


@pytest.mark.parametrize("folder", ALLOWED)
def test_paddle_is_imported_only_where_calibration_happens(folder: str) -> None:
    for path in sources(folder):
        paddle = {name for name in imports(path) if name.split(".")[0] in ("paddle", "paddleslim")}
        assert not paddle or folder in PADDLE_ONLY_IN, f"{path.relative_to(ROOT)} imports {paddle}"


def test_the_six_folders_are_what_the_package_links_to() -> None:
    for folder in ALLOWED:
        link = ROOT / "src" / "quantbench" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
