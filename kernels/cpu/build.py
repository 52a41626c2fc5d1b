"""Builds the native CPU library at first use and keeps it in the user's cache directory.

`python -m kernels.cpu.build` does it ahead of time. The cache key covers the sources, the flags, the
compiler and the processor's features, so that a cache on a shared disk serves different machines.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from kernels.cache import cache_directory

_SOURCES = Path(__file__).parent / "src"
_COMPILE_TIMEOUT_S = 300
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
_ISA_FLAGS = {
    "native": ("-march=native",),
    "avx512vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mavx2"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": (),
}


def build() -> Path:
    """Path of the shared library, built if it is not there yet. Safe in many processes at once.

    KERNELS_CPU_ISA (native, avx512vnni, avx2, generic) chooses the instruction set; default native.

    Raises:
        OSError: no compiler, or it failed; the message says what it printed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found (g++, c++, clang++; or set CXX)")
    isa = os.environ.get("KERNELS_CPU_ISA", "native")
    if isa not in _ISA_FLAGS:
        raise OSError(f"KERNELS_CPU_ISA={isa!r} (allowed: {', '.join(_ISA_FLAGS)})")
    flags = (*_FLAGS, *_ISA_FLAGS[isa])
    target = cache_directory() / "kernels" / f"cpu-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for one compilation at most, which has a deadline
        if not target.exists():
            _compile(compiler, flags, target)
    return target


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
    os.close(descriptor)
    command = [compiler, *flags, str(_SOURCES / "library.cpp"), "-o", temporary]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        os.replace(temporary, target)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{compiler} failed: {error.stderr.strip()[:2000]}") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{compiler} did not finish within {_COMPILE_TIMEOUT_S} s") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=False).stdout
    digest.update(version + " ".join(flags).encode() + _cpu_features().encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


if __name__ == "__main__":
    print(build())
