"""Hub names (`org/name`): read from the local cache; downloaded only by `fetch_hub`, which is asked for by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quantbench.errors import DependencyError, ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNWANTED = ["consolidated*", "original/*"]  # the same weights once more, in another layout
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]


def is_hub_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def cached_directory(name: str) -> Path:
    """The snapshot of `name` in the local cache. Raises ModelError with the line that fetches it."""
    try:
        return Path(_hub().snapshot_download(name, local_files_only=True, allow_patterns=_WANTED))
    except (OSError, ValueError):  # huggingface_hub's LocalEntryNotFoundError is both
        raise ModelError(
            f"{name}: no such file or directory, and no hub model of this name in the local cache. "
            f"To download it: quantbench fetch {name}"
        ) from None


def fetch_hub(name: str) -> Path:
    """Downloads `name` into the cache of huggingface_hub. Raises ModelError with the hub's own reason."""
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError) as reason:
        raise ModelError(f"{name}: the hub did not give it: {reason}") from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise DependencyError("hub names need huggingface_hub: pip install 'quantbench[hub]'") from None
    return huggingface_hub
