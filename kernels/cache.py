"""Where files that can be made again are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """PEREGRINE_CACHE_DIR, or `peregrine` in the user's cache directory (XDG base directories)."""
    if directory := os.environ.get("PEREGRINE_CACHE_DIR"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peregrine"
