"""Builds the CUDA library (Hopper, sm_90a) at first use and keeps it in the user's cache directory.

`python -m kernels.cuda.build` does it ahead of time. KERNELS_CUDA_LIBRARY names a library built elsewhere,
for machines without a compiler. With KERNELS_CUDA_RACECHECK=1 it is one that compute-sanitizer's racecheck
understands (src/async.cuh), and slower:

    KERNELS_CUDA_RACECHECK=1 compute-sanitizer --tool racecheck \\
        python -m pytest -m gpu tests/kernels/test_cuda_step.py -k gated
"""

import ctypes
import functools
import os
import shutil
from pathlib import Path

from kernels.compilation import cached_library

_SOURCES = Path(__file__).parent / "src"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler=-fPIC",
    "-shared",
    "--expt-relaxed-constexpr",
)


def build() -> Path:
    """Path of the shared library, built (in about a minute) if it is not there yet.

    Safe in many processes at once.

    Raises:
        OSError: no nvcc, or it failed; the message says what it printed.
    """
    if prebuilt := os.environ.get("KERNELS_CUDA_LIBRARY"):
        return Path(prebuilt)
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        raise OSError("no nvcc found (put it on the PATH, or name a built library in KERNELS_CUDA_LIBRARY)")
    sources = [s.name for s in sorted(_SOURCES.glob("*.cu"))]
    checks = ("-DPEREGRINE_RACECHECK",) if os.environ.get("KERNELS_CUDA_RACECHECK") == "1" else ()
    command = (compiler, *_FLAGS, *checks, f"--threads={len(sources)}")
    return cached_library("cuda", command, _SOURCES, sources, timeout_s=600)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises OSError where it cannot be built or loaded."""
    lib = ctypes.CDLL(str(build()))
    lib.peregrine_error.restype = ctypes.c_char_p
    return lib


def check(status: int) -> None:
    """Raises RuntimeError for a CUDA status other than success."""
    if status != 0:
        raise RuntimeError(f"CUDA: {library().peregrine_error(status).decode()}")


if __name__ == "__main__":
    print(build())
