"""The CUDA kernels of csrc compiled for the CPU with an emulated execution model, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from less_fast.projection import Projection

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
H100_SHARED, SMALL_SHARED = 232448, 48 << 10
_FLAGS = ("-std=c++17", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(folder: Path, *flags: str) -> Path:
    """Compile the emulated kernels into ``folder``; skips where there is no g++ (fails under LESS_FAST_STRICT=1)."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        if os.environ.get("LESS_FAST_STRICT") == "1":
            pytest.fail("there is no g++ on Linux, and LESS_FAST_STRICT=1 allows no skipping")
        pytest.skip("emulating CUDA needs g++ on Linux")
    emulator = Path(__file__).parent / "cuda_emulator"
    library = folder / "cuda_emulated.so"
    sources = [str(emulator / "kernels.cpp"), "-x", "c++", *map(str, sorted(CSRC.glob("cuda_*.cu")))]
    command = [compiler, *_FLAGS, *(flags or ("-O1",)), f"-I{emulator}", f"-I{CSRC}", *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels, compiled once a process; LESS_FAST_CUDA_EMULATED names one that is already compiled."""
    path = os.environ.get("LESS_FAST_CUDA_EMULATED")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return _load(build(Path(folder)))
    return _load(Path(path))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    big = ctypes.c_int64
    loaded.configure.argtypes = [ctypes.c_uint, big]
    loaded.srht_workspace.argtypes, loaded.srht_workspace.restype = [big, big, big, ctypes.c_int], big
    loaded.sjlt_workspace.argtypes, loaded.sjlt_workspace.restype = [big, big, big], big
    call = [ctypes.c_void_p, big, big, ctypes.c_void_p, ctypes.c_int, big, big, big, big, ctypes.c_int]
    for name in ("srht", "sjlt"):
        getattr(loaded, name).argtypes = [*call, ctypes.c_uint64, ctypes.c_void_p]
    return loaded


def accumulate_emulated(
    features: Tensor,
    grads: Tensor,
    projection: Projection,
    base: int = 0,
    *,
    order: int = 0,
    shared: int = H100_SHARED,
) -> None:
    """Features (N, K) += sketch of grads (N, P); ``base``: the first run's number (srht) or entry's index (sjlt).

    ``order`` is how emulated threads take turns, ``shared`` the bytes of shared memory that a block can have.
    """
    emulated = library()
    emulated.configure(order, shared)
    n, size = grads.shape
    sizes = (n, size, projection.dim) + ((projection.block,) if projection.kind == "srht" else ())
    needed = getattr(emulated, f"{projection.kind}_workspace")(*sizes)
    workspace = torch.full((needed // 4,), torch.nan)  # what is not written is seen
    code = getattr(emulated, projection.kind)(
        features.data_ptr(), projection.dim, features.stride(0),
        grads.data_ptr(), DTYPES[grads.dtype], n, size, grads.stride(0), base,
        projection.block if projection.kind == "srht" else projection.nnz, projection.seed, workspace.data_ptr(),
    )  # fmt: skip
    assert code == 0, f"cudaError_t {code}"
