"""The built CUDA module: it imports and explains itself without a driver; its kernels stay within their registers."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from less_fast.errors import UnsupportedBackendError
from less_fast.layout import ParameterLayout
from less_fast.ops import cuda
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

# Registers a thread, in the steps that change how many threads fit a multiprocessor, for nvcc 13.0.
BUDGETS = json.loads((Path(__file__).parent / "cuda_budgets.json").read_text())
ARCHS = ("80", "90", "100")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    try:
        return importlib.import_module("less_fast._cuda")
    except ImportError as error:
        if shutil.which("nvcc") and os.environ.get("LESS_FAST_STRICT") == "1":
            pytest.fail(f"there is an nvcc, and LESS_FAST_STRICT=1 allows no module to be missing: {error}")
        pytest.skip(f"less_fast._cuda is not built: {error}")


def disassembler() -> str:
    """Path of the cuobjdump that comes with Triton."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton, which is not installed")
    return str(triton.knobs.nvidia.cuobjdump.path)


def resources(library: str) -> dict[tuple[str, str], dict[str, int]]:
    """What each kernel occupies, by (kernel, architecture)."""
    command = [disassembler(), "--dump-resource-usage", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[kernel_name(name), arch] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def kernel_name(mangled: str) -> str:
    """srht_BFloat16_4_8 and the like, from a mangled name: the kernel and its template arguments."""
    match = re.search(r"\d(srht|sjlt|sum)_kernel(?:I(.*?)EE)?", mangled)
    assert match is not None, mangled
    arguments = re.findall(r"NS_\d+([A-Z][A-Za-z0-9]*?)E|L[ib](\d+)", match[2] or "")
    return "_".join([match[1], *(a or b for a, b in arguments)])


def test_registers_stay_within_budget(module: ModuleType) -> None:
    assert module.__file__ is not None
    used = resources(module.__file__)
    missing = [arch for arch in ARCHS if all(found != arch for _, found in used)]
    if missing:
        pytest.skip(f"less_fast._cuda was built without sm_{', sm_'.join(missing)}")
    assert set(used) == {(name, arch) for name in BUDGETS for arch in ARCHS}
    for (name, arch), found in used.items():
        assert found["REG"] <= BUDGETS[name][arch], (name, arch, found)
        assert found["STACK"] == found["LOCAL"] == 0, f"{name} spills on sm_{arch}"


def test_no_float_is_added_atomically(module: ModuleType) -> None:
    assert module.__file__ is not None
    done = subprocess.run([disassembler(), "-sass", module.__file__], check=True, capture_output=True, text=True)
    assert re.search(r"ATOMS?\S*\.ADD", done.stdout) is not None
    assert re.search(r"(ATOM|RED)\w*\.\S*F(16|32|64)", done.stdout) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_without_a_driver_the_module_says_so(module: ModuleType) -> None:
    grads, features = module.Gradients(0, module.FLOAT32, 1, 64, 64), module.Features(0, 64, 64)
    calls: list[Any] = [
        lambda: module.check_device(0),
        lambda: module.sjlt_max_dim(0),
        lambda: module.srht(features, grads, 0, 64, 0, module.Place(0, 0, 0)),
        lambda: module.sjlt(features, grads, 0, 1, 0, module.Place(0, 0, 0)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"cudaError.*no NVIDIA driver|no CUDA-capable device"):
            call()
    reason = cuda.device_reason(0)
    assert reason is not None and "cannot run on cuda:0" in reason and "\n" not in reason


def test_it_says_why_it_cannot_run(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    features, grads = torch.zeros(1, 64), torch.zeros(1, 1, 64)
    assert "CUDA devices" in str(cuda.supports(features, grads, Projection("srht", 64)))
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "MISSING", "it is not there")
    assert cuda.supports(features, grads, Projection("srht", 64)) == "it is not there"
    with pytest.raises(UnsupportedBackendError, match="it is not there"):
        cuda.accumulate_cuda(features, grads, ParameterLayout.flat(64).parameters[0], 0, Projection("srht", 64), NONE)


class OnCuda:
    """What ``supports`` asks a tensor for, without a device to put one on."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.ndim, self.dtype, self.device = torch.Size(shape), len(shape), dtype, torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("features", "grads", "projection", "rule", "word"),
    [
        (OnCuda(2, 64), OnCuda(2, 1, 99), Projection("srht", 64), NONE, None),
        (OnCuda(2, 8192), OnCuda(2, 1, 99, dtype=torch.bfloat16), Projection("sjlt", 8192, nnz=3), NONE, None),
        (OnCuda(2, 64, dtype=torch.float64), OnCuda(2, 1, 99), Projection("srht", 64), NONE, "float64"),
        (OnCuda(2, 64), OnCuda(2, 1, 99, dtype=torch.float64), Projection("srht", 64), NONE, "float64"),
        (OnCuda(2, 64), OnCuda(2, 1, 99), Projection("rademacher", 64), NONE, "rademacher"),
        (OnCuda(2, 64), OnCuda(2, 4, 99), Projection("srht", 64), NONE, "flat"),
        (OnCuda(2, 64), OnCuda(2, 1, 99), Projection("srht", 64), Rule("sign"), "rule sign"),
        (OnCuda(2, 64), OnCuda(2, 1, 99), Projection("srht", 64, block=16), NONE, "block is 16"),
        (OnCuda(2, 512), OnCuda(2, 1, 99), Projection("srht", 512, block=512), NONE, "block is 512"),
        (OnCuda(2, 60_000), OnCuda(2, 1, 99), Projection("sjlt", 60_000), NONE, "shared memory"),
        (OnCuda(2, 64), OnCuda(2, 1, 2**36), Projection("sjlt", 64, nnz=8), NONE, "integer sums"),
    ],
)
def test_what_it_supports(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    features: Any, grads: Any, projection: Projection, rule: Rule, word: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    monkeypatch.setattr(cuda, "_max_dim", lambda device: 58_108)
    reason = cuda.supports(features, grads, projection, rule)
    assert reason is None if word is None else reason is not None and word in reason


def test_workspace_is_per_example_and_bounded(module: ModuleType) -> None:
    for size in (1, 8192, 10**6, 134_000_000, 2**36):
        for dim in (64, 8192, 65_536):
            one = module.srht_workspace(1, size, dim, 64)
            assert module.srht_workspace(7, size, dim, 64) == 7 * one
            assert one <= max(4 << 20, 8 * dim)
            one = module.sjlt_workspace(1, size, dim)
            assert module.sjlt_workspace(7, size, dim) == 7 * one
            assert one <= 128 * 4 * dim


def test_importing_needs_no_torch_and_no_driver_library(module: ModuleType) -> None:
    assert module.__file__ is not None
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_cuda', {module.__file__!r});"
        "importlib.util.module_from_spec(spec);"
        "assert 'torch' not in sys.modules; print('libcuda.so' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
