"""The CUDA kernels, emulated on the CPU and, where there is one, on a device, against the float64 reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import child_environment
from support.cuda_emulated import SANITIZE, SMALL_SHARED, accumulate_emulated, build
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops import cuda
from less_fast.ops.accumulate import accumulate
from less_fast.ops.rule import NONE
from less_fast.projection import Projection

Run = Callable[..., None]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def on_cuda(features: Tensor, grads: Tensor, projection: Projection, base: int = 0, **_: Any) -> None:
    """What ``accumulate_emulated`` does, on the current CUDA device."""
    size = grads.shape[1]
    device = torch.empty_strided(grads.shape, grads.stride(), dtype=grads.dtype, device="cuda").copy_(grads)
    target = features.cuda()
    reason = cuda.supports(target, device.unsqueeze(1), projection)
    assert reason is None, reason
    parameter = Parameter("flat", 1, size, base, True)
    cuda.accumulate_cuda(target, device.unsqueeze(1), parameter, base, projection, NONE)
    features.copy_(target)


_ABSENT = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    params=[
        pytest.param(accumulate_emulated, id="emulated"),
        pytest.param(on_cuda, id="cuda", marks=[pytest.mark.gpu, _ABSENT]),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


def reference(grads: Tensor, projection: Projection, base: int, dtype: torch.dtype = torch.float64) -> Tensor:
    features = torch.zeros(grads.shape[0], projection.dim, dtype=dtype)
    parameter = Parameter("flat", 1, grads.shape[1], base, True)
    accumulate(features, grads.to(dtype).unsqueeze(1), parameter, base, projection, backend="reference")
    return features


def draw(n: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(n, size, generator=torch.Generator().manual_seed(seed)) * 1e-2).to(dtype)


def sketch(run: Run, grads: Tensor, projection: Projection, base: int = 0, **how: Any) -> Tensor:
    features = torch.zeros(grads.shape[0], projection.dim)
    run(features, grads, projection, base, **how)
    return features


def assert_as_exact_as_float32(out: Tensor, grads: Tensor, projection: Projection, base: int = 0) -> None:
    exact = reference(grads, projection, base)
    single = reference(grads, projection, base, torch.float32)
    rms = exact.square().mean().sqrt()
    error, allowed = (out - exact).square().mean().sqrt(), (single - exact).square().mean().sqrt()
    assert error <= 2 * allowed + 1e-6 * rms, (float(error / rms), float(allowed / rms))


# (n, P, projection, base): base is a run's number or an entry's index.
CASES = [
    (1, 1, Projection("srht", 64), 0),
    (3, 63, Projection("srht", 64, seed=2**63 + 5), 7),
    (1, 64, Projection("srht", 192), 2**33 + 1),
    (17, 65, Projection("srht", 8192), 127),
    (5, 1000, Projection("srht", 8192), 8191),
    (4, 30_011, Projection("srht", 320, seed=3), 3),
    (5, 20_000, Projection("srht", 1024, seed=9, block=32), 2**40 + 5),
    (2, 9_999, Projection("srht", 384, block=128), 1),
    (4, 5_000, Projection("srht", 2304, block=256), 8),
    (1, 70_000, Projection("srht", 64, block=32), 1),
    (1, 1, Projection("sjlt", 64), 0),
    (3, 63, Projection("sjlt", 64, seed=2**63 + 5), 7),
    (17, 65, Projection("sjlt", 8192), 2**32 - 30),
    (5, 1000, Projection("sjlt", 1000, seed=3), 2**40 + 5),
    (4, 30_011, Projection("sjlt", 100, seed=3), 3),
    (5, 9_000, Projection("sjlt", 77, nnz=3), 1),
    (1, 140_000, Projection("sjlt", 33, nnz=2), 0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}x{c[1]}-{c[2].kind}-{c[2].dim}-{c[3]}")
def test_sketches_equal_the_reference(run: Run, case: tuple[int, int, Projection, int], dtype: torch.dtype) -> None:
    n, size, projection, base = case
    grads = draw(n, size, dtype)
    assert_as_exact_as_float32(sketch(run, grads, projection, base), grads, projection, base)


@pytest.mark.parametrize("projection", [Projection("srht", 256), Projection("sjlt", 100, nnz=2)], ids=lambda p: p.kind)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_stride_and_features_that_hold_something(run: Run, projection: Projection, dtype: torch.dtype) -> None:
    # Rows 5,003 apart are on no 16-byte boundary, rows 5,008 apart are.
    for stride in (5_003, 5_008):
        grads = draw(6, stride, dtype)[:, :5_000]
        held = torch.full((6, projection.dim + 3), 7.0)
        features = held[:, : projection.dim]
        run(features, grads, projection, 2)
        expected = reference(grads, projection, 2) + 7.0
        assert (features - expected).abs().max() < 4e-6
        assert torch.equal(held[:, projection.dim :], torch.full((6, 3), 7.0))


@pytest.mark.parametrize("projection", [Projection("srht", 256), Projection("sjlt", 100)], ids=lambda p: p.kind)
def test_an_example_does_not_depend_on_its_neighbours(run: Run, projection: Projection) -> None:
    grads = draw(7, 20_001, torch.bfloat16)
    together = sketch(run, grads, projection)
    for n in (0, 3, 4, 6):
        assert torch.equal(sketch(run, grads[n : n + 1].clone(), projection)[0], together[n])
    assert torch.equal(sketch(run, grads[2:7], projection), together[2:7])
    assert torch.equal(sketch(run, grads, projection), together)


@pytest.mark.parametrize("projection", [Projection("srht", 256), Projection("sjlt", 100, nnz=2)], ids=lambda p: p.kind)
def test_the_order_of_threads_does_not_matter(projection: Projection) -> None:
    grads = draw(5, 20_001)
    grads[:, 12_000] = 1e4  # the scale of sjlt is lowered on the way
    first = sketch(accumulate_emulated, grads, projection)
    for order in (1, 2, 3):
        assert torch.equal(sketch(accumulate_emulated, grads, projection, order=order), first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("projection", [Projection("srht", 256), Projection("sjlt", 100)], ids=lambda p: p.kind)
def test_a_non_finite_entry_spoils_its_row_alone(run: Run, projection: Projection, value: float) -> None:
    for dtype in FLOATS:
        grads = draw(6, 20_001, dtype)
        clean = sketch(run, grads, projection)
        grads[2, 10_007] = value
        grads[5, 20_000] = value
        out = sketch(run, grads, projection)
        rest = [0, 1, 3, 4]
        assert torch.equal(out[rest], clean[rest])
        assert not torch.isfinite(out[2]).all() and not torch.isfinite(out[5]).all()
        if projection.kind == "sjlt":
            assert torch.isnan(out[[2, 5]]).all()


def heavy_tailed(size: int) -> Tensor:
    """Rows that are hard for fixed point: outliers early, late and rising; tiny and huge; zeros first; all zero."""
    base = draw(7, size)
    base[0, 5] = 1e6
    base[1, size - 1] = -1e9
    base[2] *= torch.logspace(-20, 20, size)
    base[3] *= 1e-30
    base[4] *= 1e37
    base[5, : size - 10] = 0
    base[6] = 0
    return base


@pytest.mark.parametrize("nnz", [1, 3])
def test_sjlt_is_exact_whatever_the_range_of_the_gradients(run: Run, nnz: int) -> None:
    grads, projection = heavy_tailed(20_001), Projection("sjlt", 128, seed=4, nnz=nnz)
    out = sketch(run, grads, projection)
    for n in range(len(grads)):
        assert_as_exact_as_float32(out[n : n + 1], grads[n : n + 1], projection)


def test_sjlt_sums_that_leave_32_bits_are_exact(run: Run) -> None:
    # Every entry is the largest, and one bucket takes them all: each sum wraps hundreds of times.
    projection = Projection("sjlt", 1, seed=4)
    signs = reference(torch.eye(4_000), projection, 0).flatten().float()
    out = sketch(run, torch.stack([signs, -signs, signs]), projection)
    assert torch.equal(out.flatten(), torch.tensor([4_000.0, -4_000.0, 4_000.0]))


def test_sjlt_where_shared_memory_holds_one_example() -> None:
    grads, projection = draw(5, 9_000), Projection("sjlt", 8192, seed=4)
    small = sketch(accumulate_emulated, grads, projection, shared=SMALL_SHARED)
    assert torch.equal(small, sketch(accumulate_emulated, grads, projection))


def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if found.returncode != 0 or not Path(found.stdout.strip()).exists():
        pytest.skip("g++ has no AddressSanitizer here")
    compiled = build(tmp_path, "-O0", *SANITIZE)
    settings = {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LESS_FAST_CUDA_EMULATED": str(compiled),
    }
    command = [sys.executable, str(Path(__file__).parent / "support" / "cuda_sanitized.py")]
    done = subprocess.run(
        command, env=child_environment(**settings), capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sketches: 6" in done.stdout
