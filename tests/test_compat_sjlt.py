"""Our ``sjlt``: its matrix is the buffers', its numbers are float64's, and the original's own tests pass on it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import oracle, upstream
from support.children import child_environment
from support.rounding import assert_product
from torch import Tensor

from less_fast.compat import sjlt
from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.ops.project import project
from less_fast.projection import Projection

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(137, 50, 1), (64, 33, 4), (70, 40, 33), (1, 1, 1)]  # original_dim, proj_dim, c

INSTALL = "from less_fast.compat import sjlt\nsjlt.install()\n"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def written(module: sjlt.SJLTProjection, seed: int = 1) -> sjlt.SJLTProjection:
    """The module with random buffers, written as dattri does."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.rand_indices.shape
    module.rand_indices.copy_(torch.randint(module.proj_dim, shape, generator=generator))
    module.rand_signs.copy_(torch.randint(2, shape, generator=generator) * 2 - 1)
    return module


def dense(module: sjlt.SJLTProjection) -> Tensor:
    """S as its buffers say: float64 (proj_dim, original_dim)."""
    matrix = torch.zeros(module.proj_dim, module.original_dim, dtype=torch.float64)
    for j, (buckets, signs) in enumerate(zip(module.rand_indices.tolist(), module.rand_signs.tolist())):
        for bucket, sign in zip(buckets, signs):
            matrix[bucket, j] += sign / len(buckets) ** 0.5
    return matrix


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Projection]]:
    """The projections that our kernels were asked for."""
    asked: list[Projection] = []

    def spy(x: Tensor, projection: Projection) -> Tensor:
        asked.append(projection)
        return project(x, projection)

    monkeypatch.setattr(sjlt, "project", spy)
    yield asked


@pytest.mark.parametrize("shape", SHAPES)
def test_own_tables_are_the_projections_definition(shape: tuple[int, int, int]) -> None:
    size, dim, c = shape
    module = sjlt.SJLTProjection(size, dim, c, device="cpu", seed=2**40 + 7)
    assert module.projection == Projection("sjlt", dim, 2**40 + 7, nnz=c)
    expected = torch.from_numpy(oracle.matrix(module.projection, ParameterLayout.flat(size)))
    torch.testing.assert_close(dense(module), expected, rtol=0, atol=1e-12)


def test_own_tables_of_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sjlt.SJLTProjection(500, 64, 3, device="cpu", seed=4)
    monkeypatch.setattr(sjlt, "_ENTRIES", 100)  # pieces of 33 columns
    pieces = sjlt.SJLTProjection(500, 64, 3, device="cpu", seed=4)
    assert torch.equal(whole.rand_indices, pieces.rand_indices) and torch.equal(whole.rand_signs, pieces.rand_signs)


@pytest.mark.parametrize("own", [True, False], ids=["own", "written"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_transpose_against_float64(shape: tuple[int, int, int], dtype: torch.dtype, own: bool) -> None:
    size, dim, c = shape
    module = sjlt.SJLTProjection(size, dim, c, device="cpu", seed=3)
    if not own:
        written(module)
    x, y = torch.randn(5, size).to(dtype), torch.randn(5, dim).to(dtype)
    assert_product(module(x), x, dense(module))
    assert_product(module.transpose(y), y, dense(module).T)
    assert torch.equal(module(x), module(x)) and torch.equal(module.transpose(y), module.transpose(y))
    assert torch.equal(module(x.T.contiguous().T), module(x))
    assert module(x).is_contiguous() and module.transpose(y).is_contiguous()


@pytest.mark.parametrize("own", [True, False], ids=["own", "written"])
def test_transpose_is_the_adjoint(own: bool) -> None:
    module = sjlt.SJLTProjection(300, 48, 5, device="cpu", seed=3)
    if not own:
        written(module)
    x, y = torch.randn(7, 300, dtype=torch.float64), torch.randn(7, 48, dtype=torch.float64)
    torch.testing.assert_close((module(x) * y).sum(1), (x * module.transpose(y)).sum(1), rtol=1e-12, atol=1e-12)


def test_kernels_run_while_the_tables_are_own_and_the_buffers_rule_afterwards(calls: list[Projection]) -> None:
    module = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=1)
    x = torch.randn(3, 90)
    first = module(x)
    assert len(calls) == 1 and torch.equal(first, project(x, module.projection))
    state = {name: value.clone() for name, value in module.state_dict().items()}

    for seed in (1, 2):  # written twice, as for two ensembles
        written(module, seed)
        assert_product(module(x), x, dense(module))
    module.rand_signs[4] *= -1
    assert_product(module(x), x, dense(module))
    module.rand_indices = (module.rand_indices + 1) % 20
    assert_product(module(x), x, dense(module))
    assert len(calls) == 1

    module.load_state_dict(state)  # own again
    assert torch.equal(module(x), first) and len(calls) == 2
    module.rand_indices = module.rand_indices.clone()
    assert torch.equal(copy.deepcopy(module)(x), first) and len(calls) == 3


def saved(module: sjlt.SJLTProjection) -> sjlt.SJLTProjection:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: sjlt.SJLTProjection = torch.load(file, weights_only=False)
    return loaded


def pickled(module: sjlt.SJLTProjection) -> sjlt.SJLTProjection:
    again: sjlt.SJLTProjection = pickle.loads(pickle.dumps(module))
    return again


@pytest.mark.parametrize("used", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("copied", [copy.deepcopy, saved, pickled, copy.copy])
def test_copies_have_the_matrix_that_was_written(
    copied: Callable[[sjlt.SJLTProjection], sjlt.SJLTProjection], writes: int, used: bool
) -> None:
    """A tensor's writes are counted from its making, which a copy's is too."""
    module = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=1)
    x = torch.randn(3, 90)
    for seed in range(writes):
        written(module, seed)
    if used:
        module(x)
    again = copied(module)
    assert torch.equal(again.rand_indices, module.rand_indices)
    assert_product(again(x), x, dense(module))
    written(again, 9)
    assert_product(again(x), x, dense(again))
    assert_product(module(x), x, dense(module))


def test_numpys_integers_are_integers() -> None:
    size, dim, c, seed = np.array([90, 20, 2, 5])
    module = sjlt.SJLTProjection(size, dim, c, device="cpu", seed=seed)
    same = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=5)
    assert module.projection == same.projection and repr(module) == repr(same)
    x = torch.randn(3, 90)
    assert torch.equal(module(x), same(x))


def test_the_device_can_be_set() -> None:
    module = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=5)
    module.device = torch.device("meta")
    assert module.device.type == module.rand_indices.device.type == module.rand_signs.device.type == "meta"


def test_own_tables_are_sorted_where_no_kernel_takes_the_input(
    calls: list[Projection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float64 on a GPU, where the reference's order of additions is not fixed."""
    monkeypatch.setattr(sjlt, "resolve", lambda *arguments: "reference")
    module = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=1)
    x = torch.randn(3, 90)
    elsewhere = SimpleNamespace(type="cuda")
    like_x = SimpleNamespace(device=elsewhere, dtype=x.dtype, new_empty=x.new_empty, unsqueeze=x.unsqueeze)
    assert not module._kernels_take(like_x)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_kernels_take", lambda x: False)
    assert_product(module(x), x, dense(module))
    assert calls == []


def test_writes_in_inference_mode_are_seen() -> None:
    x = torch.randn(3, 90)
    with torch.inference_mode():
        module = sjlt.SJLTProjection(90, 20, 2, device="cpu", seed=1)
        module(x)
        written(module)
        assert_product(module(x), x, dense(module))
        module.rand_indices = torch.randint(20, (90, 2))  # counts no writes
        for _ in range(2):
            module.rand_indices.add_(1).remainder_(20)
            assert_product(module(x), x, dense(module))


def test_the_seed_decides_or_torchs_does() -> None:
    def indices(seed: int | None = None) -> Tensor:
        return sjlt.SJLTProjection(50, 1000, device="cpu", seed=seed).rand_indices

    assert torch.equal(indices(5), indices(5)) and not torch.equal(indices(5), indices(6))
    torch.manual_seed(8)
    first, second = indices(), indices()
    torch.manual_seed(8)
    assert torch.equal(indices(), first) and not torch.equal(first, second)


def test_zero_rows_and_zeros() -> None:
    module = sjlt.SJLTProjection(30, 10, 2, device="cpu", seed=0)
    for _ in range(2):
        assert module(torch.zeros(0, 30)).shape == (0, 10) and module.transpose(torch.zeros(0, 10)).shape == (0, 30)
        assert not module(torch.zeros(2, 30)).any()
        written(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"original_dim": 0, "proj_dim": 10}, "original_dim is 0 and proj_dim 10; expected positive numbers"),
        ({"original_dim": 10, "proj_dim": -1}, "original_dim is 10 and proj_dim -1; expected positive numbers"),
        ({"original_dim": 10, "proj_dim": 5, "c": 0}, "c is 0; expected 1 to proj_dim = 5"),
        ({"original_dim": 10, "proj_dim": 5, "c": 6}, "c is 6; expected 1 to proj_dim = 5"),
        ({"original_dim": 10, "proj_dim": 5000, "c": 2000}, "c is 2000; expected up to 1024"),
    ],
)
def test_sizes_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        sjlt.SJLTProjection(device="cpu", **arguments)
    assert str(raised.value) == message


def test_input_that_does_not_fit() -> None:
    module = sjlt.SJLTProjection(10, 5, 2, device="cpu")
    for call, width in ((module, 10), (module.transpose, 5)):
        for wrong in (torch.zeros(3, width + 1), torch.zeros(width), torch.zeros(3, width, dtype=torch.int64)):
            with pytest.raises(LessFastError, match=rf"expected a floating-point \(N, {width}\)"):
                call(wrong)
    module.rand_indices[3, 1] = 5
    for call, width in ((module, 10), (module.transpose, 5)):
        with pytest.raises(LessFastError, match="rand_indices hold 0 to 5; expected 0 to proj_dim - 1 = 4"):
            call(torch.zeros(1, width))
    module.rand_indices = torch.zeros(10, 3, dtype=torch.int64)
    with pytest.raises(LessFastError, match=r"shapes \(10, 3\) and \(10, 2\); expected \(10, 2\)"):
        module(torch.zeros(1, 10))


def test_install_is_what_import_sjlt_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sjlt", None)  # undone afterwards
    sjlt.install()
    from sjlt import CUDA_AVAILABLE, EXTENSION_AVAILABLE, SJLTProjection

    assert SJLTProjection is sjlt.SJLTProjection
    assert EXTENSION_AVAILABLE and torch.cuda.is_available() == CUDA_AVAILABLE


def test_the_originals_interface_is_ours(tmp_path: Path) -> None:
    """Its Python part imports without the compiled one: parameters, attributes and buffers are compared."""
    script = """
    import inspect, json
    import sjlt as theirs
    from less_fast.compat import sjlt as ours
    theirs.EXTENSION_AVAILABLE = True  # it is only needed to apply the matrix
    VALUES = ("original_dim", "proj_dim", "c", "threads", "fixed_blocks", "normalization_factor", "device")
    METHODS = ("forward", "transpose", "get_compression_ratio", "get_sparsity_ratio")
    def describe(module):
        made = module.SJLTProjection(100, 25, 4, threads=100, fixed_blocks=7, device="cpu")
        return {
            "methods": {name: list(inspect.signature(getattr(made, name)).parameters) for name in METHODS},
            "ratios": [made.get_compression_ratio(), made.get_sparsity_ratio()],
            "values": {name: str(getattr(made, name)) for name in VALUES},
            "buffers": {name: [str(b.dtype), list(b.shape)] for name, b in made.named_buffers()},
            "repr": repr(made),
            "version": module.__version__,
            "info": sorted(module.get_cuda_info()),
        }
    def parameters(module):
        return [(p.name, str(p.default)) for p in inspect.signature(module.SJLTProjection).parameters.values()]
    both = [describe(theirs), describe(ours)]
    print(json.dumps([both, parameters(theirs), parameters(ours)]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=child_environment(PYTHONPATH=str(upstream.sdist("sjlt==0.1.7"))),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (theirs, ours), their_parameters, our_parameters = json.loads(done.stdout)
    assert ours == theirs
    assert their_parameters[-1] == ["device", "cuda"]  # ours takes CUDA where there is one
    assert our_parameters == [*their_parameters[:-1], ["device", "None"], ["seed", "None"]]


def run_theirs(tmp_path: Path, *plugins: str) -> dict[str, str]:
    for i, text in enumerate(plugins):
        (tmp_path / f"plugin_{i}.py").write_text(text)
    tests = upstream.sdist("sjlt==0.1.7") / "test" / "test_sjlt.py"
    return upstream.run_tests([tests], [tmp_path], *(f"-pplugin_{i}" for i in range(len(plugins))))


OF_CUDA = {
    "test_basic_functionality",
    "test_different_batch_sizes",
    "test_different_dtypes",
    "test_error_handling",
    "test_compression_metrics",
    "test_transpose_basic",
    "test_transpose_dimensions",
    "test_transpose_dtypes",
    "test_transpose_consistency",
    "test_transpose_error_handling",
    "test_transpose_linearity",
    "test_transpose_adjoint_property",
    "test_projection_idempotence_approximation",
    "test_transpose_gram_matrix_property",
    "test_transpose_preserves_inner_products_approximately",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: test_theirs_on_a_gpu")
def test_theirs_without_a_gpu(tmp_path: Path) -> None:
    expected = dict.fromkeys(OF_CUDA, "skipped: CUDA not available") | {"test_cuda_info": "passed"}
    assert run_theirs(tmp_path, INSTALL) == expected


def test_theirs_with_the_cpu_in_the_place_of_cuda(tmp_path: Path) -> None:
    assert run_theirs(tmp_path, upstream.CPU_AS_CUDA, INSTALL) == dict.fromkeys({*OF_CUDA, "test_cuda_info"}, "passed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_theirs_on_a_gpu(tmp_path: Path) -> None:
    seeded = "import pytest, torch\ndef pytest_runtest_setup():\n    torch.manual_seed(0)\n"
    assert run_theirs(tmp_path, seeded, INSTALL) == dict.fromkeys({*OF_CUDA, "test_cuda_info"}, "passed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_applies_the_same_matrix_with_equal_bits(dtype: torch.dtype) -> None:
    x = torch.randn(9, 5000, device="cuda").to(dtype)
    y = torch.randn(9, 256, device="cuda").to(dtype)
    module = sjlt.SJLTProjection(5000, 256, 20, device="cuda", seed=3)
    on_cpu = sjlt.SJLTProjection(5000, 256, 20, device="cpu", seed=3)
    assert torch.equal(module.rand_indices.cpu(), on_cpu.rand_indices)
    for _ in range(2):
        assert_product(module(x).cpu(), x.cpu(), dense(on_cpu))
        assert_product(module.transpose(y).cpu(), y.cpu(), dense(on_cpu).T)
        assert torch.equal(module(x), module(x)) and torch.equal(module.transpose(y), module.transpose(y))
        written(on_cpu)
        module.load_state_dict(on_cpu.state_dict())
