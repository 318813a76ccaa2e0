"""``less_fast.compat.fast_jl`` against explicit matrices of ±1s and normals, and as ``import fast_jl`` finds it."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support.children import child_environment
from support.oracle import matrix
from support.rounding import rms
from support.triton_run import interpreted_backend, require_triton
from support.upstream import CPU_AS_CUDA, packages, run_tests, sdist
from torch import Tensor

from less_fast import LessFastError, Projection
from less_fast.compat import fast_jl
from less_fast.layout import ParameterLayout
from less_fast.ops.rule import NONE

TRAK = "traker==0.3.2"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
NAMES = [f"project_{kind}_{n}" for kind in ("rademacher", "normal") for n in (8, 16, 32)]


def unscaled(kind: str, dim: int, size: int, seed: int) -> Tensor:
    """The ±1s or normals, float64 (K, P)."""
    pi = torch.from_numpy(matrix(Projection(kind, dim, seed), ParameterLayout.flat(size))) * math.sqrt(dim)
    return pi.round() if kind == "rademacher" else pi


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_sums(name: str, dtype: torch.dtype, device: str) -> None:
    # 520 features: not a multiple of 512; 37 examples: more than any of the numbers in the names.
    grads = draw(37, 700).to(dtype)
    pi = unscaled("gaussian" if "normal" in name else "rademacher", 520, 700, 5)
    found = getattr(fast_jl, name)(grads.to(device), 520, 5, 108).cpu()
    assert found.dtype == torch.float32 and found.shape == (37, 520)
    exact = grads.double() @ pi.T
    plain = grads.float() @ pi.float().T
    assert rms(found - exact) <= 2 * rms(plain - exact) + 1e-6 * rms(exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [1, 20, 512, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sums_of_integers_are_exact(dim: int, dtype: torch.dtype, device: str) -> None:
    size = 3001
    grads = torch.randint(-50, 51, (5, size), generator=torch.Generator().manual_seed(dim)).to(dtype)
    found = fast_jl.project_rademacher_8(grads.to(device), dim, 7, 1).cpu()
    assert torch.equal(found.double(), grads.double() @ unscaled("rademacher", dim, size, 7).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sums_of_integers_are_exact_in_triton_s_interpreter(dtype: torch.dtype) -> None:
    require_triton()
    size, dim = 300, 130
    grads = torch.randint(-50, 51, (3, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    where = ParameterLayout.flat(size).parameters[0], 0, fast_jl._Unscaled("rademacher", dim, 7), NONE
    found = interpreted_backend(torch.zeros(3, dim), grads.unsqueeze(1), *where)
    assert torch.equal(found.double(), grads.double() @ unscaled("rademacher", dim, size, 7).T)


@pytest.mark.parametrize("size, dim, seed", [(10240, 1024, 64), (10241, 2048, 78)])
def test_sums_of_ones_have_the_parity_of_their_number(size: int, dim: int, seed: int) -> None:
    found = fast_jl.project_rademacher_8(torch.ones(8, size, dtype=torch.float16), dim, seed, 4)
    assert torch.equal(found.remainder(2), torch.full_like(found, size % 2))
    # A sum of P signs has variance P; the chance of any feature further out than 6 of its roots is 1e-6.
    assert found.abs().max() < 6 * math.sqrt(size)
    assert abs(float(found[0].square().mean()) / size - 1) < 6 * math.sqrt(2 / dim)


def test_matrix_depends_on_kind_and_seed_alone() -> None:
    grads = draw(40, 900)
    for kind in ("rademacher", "normal"):
        eight = getattr(fast_jl, f"project_{kind}_8")(grads, 640, 3, 1)
        for batch, tiles in ((16, 40), (32, 132)):
            assert torch.equal(getattr(fast_jl, f"project_{kind}_{batch}")(grads, 640, 3, tiles), eight)
        one_by_one = torch.cat([fast_jl.project_rademacher(row[None], 640, 3) for row in grads])
        assert kind == "normal" or torch.allclose(one_by_one, eight, rtol=1e-4, atol=1e-4)
        first = getattr(fast_jl, f"project_{kind}_8")(grads, 512, 3, 1)
        torch.testing.assert_close(first, eight[:, :512], rtol=1e-4, atol=1e-4)


def test_seeds_give_unrelated_matrices_up_to_64_bits() -> None:
    grads, seeds = draw(1, 500), [0, 1, 2**32 - 1, 2**32, 2**64 - 1, np.int64(77)]
    features = torch.cat([fast_jl.project_rademacher_8(grads, 4096, seed, 1) for seed in seeds])
    correlation = torch.corrcoef(features).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4096)
    again = fast_jl.project_rademacher_8(grads, 4096, seeds[-1], 1)
    assert torch.equal(again, features[-1:])


@pytest.mark.parametrize("name", ["project_rademacher_32", "project_normal_32"])
@pytest.mark.parametrize("shape", [(16, 25), (9, 10_002), (45, 1049)], ids=str)
def test_inner_products_are_kept(name: str, shape: tuple[int, int]) -> None:
    dim = 4096
    grads = draw(*shape, seed=11) + 0.5  # rows that are not orthogonal
    grads[-1] -= grads[0] * (grads[0] @ grads[-1]) / grads[0].square().sum()  # and two that are
    features = getattr(fast_jl, name)(grads, dim, 123, 80).double()
    found, exact = features @ features.T / dim, grads.double() @ grads.double().T
    norms = exact.diagonal()
    # The variance of normals' products; that of signs' is smaller.
    deviation = ((norms[:, None] * norms[None, :] + exact.square()) / dim).sqrt()
    z = (found - exact) / deviation
    assert float(z.abs().max()) < 6
    apart = ~torch.eye(len(grads), dtype=torch.bool)
    distances, true = torch.cdist(features, features) / math.sqrt(dim), torch.cdist(grads.double(), grads.double())
    assert float((distances / true - 1)[apart].abs().max()) < 6 / math.sqrt(2 * dim)


def test_every_entry_of_the_matrix_is_what_it_should_be() -> None:
    size, dim = 400, 600
    signs = fast_jl.project_rademacher_8(torch.eye(size), dim, 1, 1)
    assert torch.equal(signs.abs(), torch.ones(size, dim))
    normals = fast_jl.project_normal_8(torch.eye(size), dim, 1, 1)
    count = size * dim
    for x in (signs, normals):
        assert abs(float(x.mean())) < 6 / math.sqrt(count)
        # Neither rows nor columns repeat or mirror each other.
        for lines in (x, x.T):
            assert float(torch.corrcoef(lines).fill_diagonal_(0).abs().max()) < 6.5 / math.sqrt(lines.shape[1])
    assert abs(float(normals.var()) - 1) < 6 * math.sqrt(2 / count)
    assert abs(float((normals.abs() < 0.6744898).float().mean()) - 0.5) < 6 * 0.5 / math.sqrt(count)


def test_takes_what_the_original_refuses_or_rounds() -> None:
    large, turned = draw(4, 30) * 1e6, draw(30, 4).T  # float16 ends at 65504
    assert not turned.is_contiguous()
    for grads in (large, turned):
        exact = grads.double() @ unscaled("rademacher", 24, 30, 9).T
        assert rms(fast_jl.project_rademacher_8(grads, 24, 9, 1) - exact) < 1e-6 * rms(exact)
    assert fast_jl.project_rademacher_8(torch.zeros(0, 30), 24, 9, 1).shape == (0, 24)
    learnt = draw(4, 30).requires_grad_()
    assert not fast_jl.project_normal_8(learnt, 24, 9, 1).requires_grad


def test_refusals_name_what_is_wrong() -> None:
    grads = draw(2, 30)
    with pytest.raises(LessFastError, match=r"floating-point \(N, P\) matrix; got shape \(30,\)"):
        fast_jl.project_rademacher_8(grads[0], 512, 0, 1)
    with pytest.raises(LessFastError, match=r"torch\.int64"):
        fast_jl.project_normal_16(grads.long(), 512, 0, 1)
    with pytest.raises(LessFastError, match="dim is 0"):
        fast_jl.project_normal_32(grads, 0, 0, 1)
    with pytest.raises(LessFastError, match="seed is -1"):
        fast_jl.project_rademacher_32(grads, 512, -1, 1)
    with pytest.raises(TypeError):
        fast_jl.project_rademacher_8(grads, 512.0, 0, 1)


def test_install_is_found_by_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_jl", None)  # it is removed when the test ends
    fast_jl.install()
    fast_jl.install()  # once more changes nothing
    assert importlib.import_module("fast_jl") is fast_jl
    assert importlib.util.find_spec("fast_jl") is not None  # quanda looks for it so
    assert all(callable(getattr(sys.modules["fast_jl"], name)) for name in NAMES)


def test_install_refuses_where_another_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("fast_jl")
    real.__file__ = "/site-packages/fast_jl.so"
    monkeypatch.setitem(sys.modules, "fast_jl", real)
    with pytest.raises(LessFastError, match=r"already imported, from /site-packages/fast_jl\.so") as raised:
        fast_jl.install()
    assert "\n" not in str(raised.value)
    assert sys.modules["fast_jl"] is real


PROGRAM = """
import sys
import helper
import fast_jl
import torch
print(__name__, sys.argv[1:], helper.NAME, fast_jl.__name__)
print(fast_jl.project_rademacher_8(torch.ones(1, 3), 512, 0, 1).abs().unique().tolist())
"""


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "less_fast.compat.fast_jl", *arguments]
    return subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True)


def test_program_runs_with_ours(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "script.py").write_text(PROGRAM)
    (tmp_path / "sub" / "helper.py").write_text("NAME = 'beside'\n")
    done = shell(tmp_path, "sub/script.py", "--flag", "-m", "7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "__main__ ['--flag', '-m', '7'] beside less_fast.compat.fast_jl",
        "[1.0, 3.0]",
    ]
    module = shell(tmp_path / "sub", "-m", "script", "--flag")
    assert module.stdout.splitlines() == ["__main__ ['--flag'] beside less_fast.compat.fast_jl", "[1.0, 3.0]"], (
        module.stderr
    )
    assert not module.stderr


def test_wrong_program_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("-m",), ("nowhere.py", "--flag")):
        with pytest.raises(SystemExit) as raised:
            fast_jl.run_with(lambda: pytest.fail("installed for no program"), arguments)
        message = capsys.readouterr().err
        assert raised.value.code == 2
        assert message.startswith("error: the program is ") and message.count("\n") == 1


# Upstream's tests of the projection, through trak's own CudaProjector, which imports fast_jl.

PLUGIN = "from less_fast.compat import fast_jl\n\nfast_jl.install()\n"
UPSTREAM = ["test_jl.py", "test_jl_additional.py", "test_rademacher.py", "test_rademacher_additional.py"]


def upstream_outcomes(names: list[str], folder: Path, **plugins: str) -> dict[str, str]:
    plugins["fast_jl_by_less_fast"] = PLUGIN
    for plugin, text in plugins.items():
        (folder / f"{plugin}.py").write_text(text)
    path = [folder, packages(TRAK), packages("assertpy==1.1")]
    files = [sdist(TRAK) / "tests" / name for name in names]
    return run_tests(files, path, *(f"-p{plugin}" for plugin in plugins), timeout=590)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_tests_pass_unchanged(name: str, tmp_path: Path) -> None:
    outcomes = upstream_outcomes([name], tmp_path)
    assert {test: outcome for test, outcome in outcomes.items() if outcome != "passed"} == {}


def test_upstream_tests_with_the_cpu_in_the_place_of_cuda(tmp_path: Path) -> None:
    """Those of a size for it: the other two files have gradients of 180 million entries and more."""
    outcomes = upstream_outcomes(["test_jl_additional.py", "test_rademacher.py"], tmp_path, cpu_as_cuda=CPU_AS_CUDA)
    shapes = [f"8-{size}-{dim}-{seed}" for size in (1024, 2048) for dim in (512, 1024, 2048) for seed in (0, 1)]
    expected = {"test_running", "test_even", "test_odd", *(f"test_shape[{shape}]" for shape in shapes)}
    of_trak = "123-rademacher-dtype0-input_shape0-4096"
    expected |= {f"{name}[{of_trak}]" for name in ("test_same_features", "test_same_features_diff_sms")}
    assert outcomes == dict.fromkeys(expected, "passed")
