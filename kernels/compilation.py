"""Compiles native libraries at first use and keeps them in the cache directory."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernels.cache import cache_directory


def cached_library(
    name: str,
    command: Sequence[str],
    directory: Path,
    sources: Sequence[str],
    *,
    salt: str = "",
    timeout_s: float = 300,
) -> Path:
    """Path of the shared library that `command` (compiler and flags) makes of `sources`, built if needed.

    The cache key covers every file of `directory`, the command, the compiler's version and `salt`. Safe in
    many processes at once.

    Raises:
        OSError: the compiler failed; the message says what it printed.
    """
    target = cache_directory() / "kernels" / f"{name}-{_key(command, directory, salt)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for one compilation at most, which has a deadline
        if not target.exists():
            _compile([*command, *(str(directory / s) for s in sources)], target, timeout_s)
    return target


def _compile(command: list[str], target: Path, timeout_s: float) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
    os.close(descriptor)
    try:
        subprocess.run(
            [*command, "-o", temporary], check=True, capture_output=True, text=True, timeout=timeout_s
        )
        os.replace(temporary, target)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed: {error.stderr.strip()[:2000]}") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not finish within {timeout_s:.0f} s") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(command: Sequence[str], directory: Path, salt: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(directory.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([command[0], "--version"], capture_output=True, timeout=60, check=False).stdout
    digest.update(version + " ".join(command).encode() + salt.encode())
    return digest.hexdigest()[:16]
