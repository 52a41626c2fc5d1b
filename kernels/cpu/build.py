"""Builds the native CPU library at first use and keeps it in the user's cache directory.

`python -m kernels.cpu.build` does it ahead of time. The cache key covers the processor's features too, so
that a cache on a shared disk serves different machines.
"""

import os
import platform
import shutil
from pathlib import Path

from kernels.compilation import cached_library

_SOURCES = Path(__file__).parent / "src"
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
    command = (compiler, *_FLAGS, *_ISA_FLAGS[isa])
    return cached_library("cpu", command, _SOURCES, ["library.cpp"], salt=_cpu_features())


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


if __name__ == "__main__":
    print(build())
