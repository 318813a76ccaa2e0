"""Our ``random_project``: the matrices of docs/projections.md, dattri's protocols, its own tests and its callers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle, upstream
from support.children import child_environment
from support.dattri_programs import LLM, TRACIN
from support.rounding import assert_product
from torch import Tensor

from less_fast.compat.dattri import ProjectionType, Projector, install, make_random_projector, random_project
from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.projection import Projection

N, P, K = 6, 500, 64
KINDS = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt", "srht": "srht"}
DATTRI, DATTRI_LLM = "dattri==0.3.0", "dattri-llm==0.1.0"


def matrix(kind: str, dim: int, seed: int, size: int = P, block: int = 64) -> Tensor:
    """The explicit matrix in float64 (dim, size), from the definitions."""
    projection = Projection(kind, dim, seed, block=block)
    return torch.from_numpy(oracle.matrix(projection, ParameterLayout.flat(size)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def applied(proj_type: str, dim: int = K, seed: int = 0, size: int = P, ensemble_id: int = 0) -> Tensor:
    """The matrix (dim, size) that the projector applies."""
    x = torch.eye(size, dtype=torch.float64)
    return random_project(x, size, dim, 16, seed, proj_type)(x, ensemble_id=ensemble_id).T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("proj_type", KINDS)
def test_matrices_are_the_definitions(proj_type: str, dtype: torch.dtype) -> None:
    x = torch.randn(N, P).to(dtype)
    out = random_project(x, N, K, 16, 11, proj_type, device="cpu")(x)
    assert_product(out, x, matrix(KINDS[proj_type], K, 11))


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (96, 32), (16, 16), (40, 8)])
def test_srht_takes_the_widest_block_that_divides_the_dimension(dim: int, block: int) -> None:
    torch.testing.assert_close(applied("srht", dim), matrix("srht", dim, 0, block=block), rtol=0, atol=1e-12)


@pytest.mark.parametrize("proj_type", [*KINDS, "random_mask", "grass"])
def test_ensembles_and_seeds_are_independent(proj_type: str) -> None:
    # Two sums, seed + 100,000 (dattri's) or 2^32 times the ensemble id, make the first and one of the last two equal.
    which = [(0, 1), (0, 0), (0, 2), (1, 0), (100_000, 0), (2**32, 0)]
    matrices = [applied(proj_type, seed=seed, ensemble_id=ensemble).flatten() for seed, ensemble in which]
    for i, one in enumerate(matrices):
        assert torch.equal(one, applied(proj_type, seed=which[i][0], ensemble_id=which[i][1]).flatten())
        for other in matrices[:i]:
            cosine = float(one @ other / (one.norm() * other.norm()))
            assert abs(cosine) < 0.2, "two independent matrices with at least 60 non-zeros"


def test_inner_products_are_kept_on_average() -> None:
    a, b = torch.randn(2, P, dtype=torch.float64)
    for proj_type in KINDS:
        project = random_project(a[None], 1, K, 16, proj_type=proj_type)
        products = torch.stack([(project(a[None], e) * project(b[None], e)).sum() for e in range(300)])
        error = float(products.mean() - a @ b) / float(products.std() / 300**0.5)
        assert abs(error) < 4, (proj_type, error)


def test_a_mask_keeps_entries_as_they_are() -> None:
    x = torch.randn(N, P)
    kept = random_project(x, N, K, 16, 3, "random_mask")(x)
    places = [int((x[0] == value).nonzero()) for value in kept[0]]
    assert torch.equal(kept, x[:, places]) and places == sorted(set(places)) and len(places) == K
    assert torch.equal(random_project(x, N, P + 7, 16, 3, "random_mask")(x), x)
    # Every entry is as likely as any other: 400 draws of 64 of 500, 51.2 expected for each.
    counts = torch.stack([applied("random_mask", ensemble_id=e).sum(0) for e in range(400)]).sum(0)
    assert counts.sum() == 400 * K
    assert float(((counts - 51.2) ** 2).mean()) == pytest.approx(51.2 * (1 - K / P), rel=0.3)


def test_grass_is_sjlt_of_a_mask() -> None:
    x = torch.randn(N, P, dtype=torch.float64)
    for name, dim, kept in (("grass", 16, 64), ("grass_2", 16, 32), ("grass_8", 16, 128), ("grass_100", 16, P)):
        masked = random_project(x, N, kept, 16, 5, "random_mask")(x)
        out = random_project(x, N, dim, 16, 5, name)(x)
        assert_product(out, masked, matrix("sjlt", dim, 5, size=kept))
    same = make_random_projector([P], N, 16, 16, "cpu", 5, "grass", dtype=torch.float64, grass_multiplier=8)
    assert torch.equal(same.project(x), random_project(x, N, 16, 16, 5, "grass_8")(x))


def test_identity_returns_its_input() -> None:
    x = torch.randn(N, P, dtype=torch.bfloat16)
    assert torch.equal(random_project(x, N, -1, 16, proj_type="identity")(x), x)


@pytest.mark.parametrize("proj_type", [t.value for t in ProjectionType])
def test_a_dict_is_its_columns_in_order(proj_type: str) -> None:
    features = {"a": torch.randn(N, 3, 5), "bias": torch.randn(N), "b": torch.randn(N, 120)}
    flat = torch.cat([features["a"].flatten(1), features["bias"][:, None], features["b"]], 1)
    made = random_project(features, N, K, 16, 2, proj_type)
    assert torch.equal(made(features), random_project(flat, N, K, 16, 2, proj_type)(flat))
    # Neither the batch it was made for nor the one at hand is part of the matrix.
    part = {name: value[:2] for name, value in features.items()}
    torch.testing.assert_close(made(part), made(features)[:2])
    assert made({name: value[:0] for name, value in features.items()}).shape == made(features)[:0].shape


@dataclass(frozen=True)
class RandomProjectionParams:
    """The fields of dattri's, which is a pydantic model after 0.3.0."""

    proj_dim: int
    proj_max_batch_size: int
    proj_seed: int
    feature_batch_size: int
    device: torch.device
    proj_type: str = "normal"


def test_both_published_protocols() -> None:
    x = torch.randn(N, P)
    expected = random_project(x, N, K, 16, 7, "rademacher", device="cpu")(x, 3)
    params = RandomProjectionParams(K, 16, 7, N, torch.device("cpu"), "rademacher")
    assert torch.equal(random_project(x, params)(x, ensemble_id=3), expected)
    assert torch.equal(random_project(feature=x, proj_params=params)(x, ensemble_id=3), expected)
    named = {"feature_batch_size": N, "proj_dim": K, "proj_max_batch_size": 16, "proj_seed": 7}
    assert torch.equal(random_project(feature=x, proj_type="rademacher", **named)(x, 3), expected)
    by_default = random_project(x, RandomProjectionParams(K, 16, 7, N, torch.device("cpu")))(x)
    assert torch.equal(by_default, random_project(x, N, K, 16, 7, "normal")(x))


def test_projectors_have_dattris_methods_and_attributes() -> None:
    made = make_random_projector([400, 100], N, K, 16, torch.device("cpu"), 9)
    assert isinstance(made, Projector) and made.proj_type == "sjlt"
    assert (made.feature_dim, made.proj_dim, made.seed, made.dtype) == (P, K, 9, torch.float32)
    x = torch.randn(N, P, dtype=torch.float64)
    assert_product(made.project(x.float(), ensemble_id=0), x.float(), matrix("sjlt", K, 9))
    assert made.project(x, 0).dtype == torch.float32
    halves = {"a": x[:, :400].float(), "b": x[:, 400:].float()}
    assert torch.equal(made.dict_project(halves, 1), made.project(x.float(), 1))
    made.free_memory()
    theirs = SimpleNamespace(value="rademacher")  # another enumeration's member
    assert make_random_projector([P], N, K, 16, "cpu", 0, theirs).proj_type is ProjectionType.rademacher  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((N, K, 16, 0, "fjlt"), "proj_type is 'fjlt'; expected one of identity, .*, or grass_N with a number N"),
        ((N, K, 16, 0, "grass_x"), "proj_type is 'grass_x'"),
        ((N, K, 16, 0, "grass_0"), "the multiplier of grass is 0; expected a positive number"),
        ((N, 0, 16, 0, "random_mask"), "proj_dim is 0; expected a positive number"),
        ((N, 100, 16, 0, "srht"), "srht cannot mix dim = 100 features well; expected a multiple of 8"),
        ((N,), "feature_batch_size is 6 and proj_dim is None; expected two positive numbers"),
        ((0, K, 16), "feature_batch_size is 0 and proj_dim is 64; expected two positive numbers"),
    ],
)
def test_what_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LessFastError, match=message):
        random_project(torch.zeros(N, P), *arguments)


@pytest.mark.parametrize("proj_type", ["srht", "grass"])
def test_compiled_callers_break_once(proj_type: str) -> None:
    """As dattri's LoGra and FactGraSS, whose compression is under torch.compile."""
    project = random_project(torch.zeros(N, P), N, K, 16, 3, proj_type)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def compressed(x: Tensor) -> Tensor:
        return project(x * 2, ensemble_id=0) + 1

    for _ in range(2):
        x = torch.randn(N, P)
        assert torch.equal(compressed(x), project(x * 2) + 1)
    assert len(graphs) == 2


@pytest.mark.parametrize("shape", [(N, P - 1), (P,), (N, 5, P // 5)], ids=str)
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    project = random_project(torch.zeros(N, P), N, K, 16)
    with pytest.raises(LessFastError, match="the projector was made for") as raised:
        project(torch.zeros(shape))
    assert str(raised.value) == f"features have shape {shape}; the projector was made for (N, {P})"


def test_no_features() -> None:
    with pytest.raises(LessFastError, match="the features are an empty mapping"):
        random_project({}, N, K, 16)
    with pytest.raises(LessFastError, match="the features are an empty mapping"):
        random_project(torch.zeros(N, P), N, K, 16)({})


@pytest.mark.parametrize("proj_type", [*KINDS, "random_mask", "grass"])
def test_numpys_integers_are_integers(proj_type: str) -> None:
    x = torch.randn(N, P)
    n, dim, seed, ensemble = np.array([N, K, 3, 2])
    found = random_project(x, n, dim, 16, seed, proj_type)
    same = random_project(x, N, K, 16, 3, proj_type)
    assert torch.equal(found(x), same(x)) and torch.equal(found(x, ensemble_id=ensemble), same(x, ensemble_id=2))


def test_install_without_dattri_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dattri", None)
    with pytest.raises(LessFastError, match="pip install dattri") as raised:
        install()
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("proj_type", [*KINDS, "random_mask", "grass"])
def test_a_gpu_has_the_same_matrix(proj_type: str) -> None:
    x = torch.randn(N, P)
    on_cpu = random_project(x, N, K, 16, 3, proj_type, device="cpu")
    on_gpu = random_project(x, N, K, 16, 3, proj_type, device="cuda")(x, 1)
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu(x, 1), rtol=1e-4, atol=1e-4)


# dattri's own tests; those of its projector classes and of Arnoldi's run its own code beside ours.
ON_CPU = {
    "test_basic_projector_shape",
    "test_arnoldi_projector",
    "test_basicprojector",
    "test_tensor_input_cpu",
    "test_arnoldi_project",
    "test_cpu_projections",
}
ON_GPU = {
    "test_proj::TestCudaProjector::test_project_output_shape",
    "test_proj::TestChunkedCudaProjector::test_project_output_shape",
    "test_dict_project_output_shape",
    "test_project_variable_batch_size",
    "test_project_rejects_dict_input",
    "test_cudaprojector",
    "test_chunkedcudaprojector",
    "test_tensor_input_cuda",
    "test_tensor_input_chunked_cuda",
    "test_cuda_projections",
    "test_cuda_grass_with_multiplier",
}
PLUGIN = """
import pytest, torch
from less_fast.compat import dattri, sjlt
dattri.install()
sjlt.install()
from dattri.func import projection
assert projection.random_project is dattri.random_project
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.manual_seed(0)
"""


def run_theirs(tmp_path: Path, marks: str) -> dict[str, str]:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    tests = upstream.sdist(DATTRI) / "test" / "dattri" / "func" / "test_proj.py"
    path = [tmp_path, upstream.packages(DATTRI)]
    return upstream.run_tests([tests], path, "-pplugin", "-m", marks, "-W", "ignore::pytest.PytestUnknownMarkWarning")


def test_theirs_on_a_cpu(tmp_path: Path) -> None:
    assert run_theirs(tmp_path, "not gpu") == dict.fromkeys(ON_CPU, "passed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_theirs_on_a_gpu(tmp_path: Path) -> None:
    assert run_theirs(tmp_path, "gpu") == dict.fromkeys(ON_GPU, "passed")


def in_process_with(requirement: str, tmp_path: Path, script: str) -> dict[str, Any]:
    """What a script prints as JSON, run where the library can be imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=child_environment(PYTHONPATH=str(upstream.packages(requirement))),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_scaling_is_theirs(tmp_path: Path) -> None:
    """Mean squared norms of projected unit vectors, by type: theirs on a CPU and ours."""
    script = """
    import json
    import torch
    from dattri.func.projection import random_project as theirs
    from less_fast.compat.dattri import random_project as ours
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(200, 1000))
    print(json.dumps({
        kind: [float(f(x, 200, 256, 16, 0, kind, device="cpu")(x).pow(2).sum(1).mean()) for f in (theirs, ours)]
        for kind in ("normal", "rademacher", "random_mask", "identity")
    }))
    """
    for kind, (theirs, ours) in in_process_with(DATTRI, tmp_path, script).items():
        assert ours == pytest.approx(theirs, rel=0.03), kind  # 51,200 normals: 0.6 %


def test_dattris_tracin_projects_with_ours(tmp_path: Path) -> None:
    answer = in_process_with(DATTRI, tmp_path, TRACIN)
    expected = torch.zeros(10, 3, dtype=torch.float64)
    # The second checkpoint is ensemble 1.
    seeds = 5, int.from_bytes(hashlib.blake2b(b"5 1", digest_size=8).digest(), "little")
    for i, weight in enumerate((0.3, 0.7)):
        grads = torch.tensor(answer["grads"][i], dtype=torch.float64)
        features = grads @ matrix("srht", 64, seeds[i], size=grads.shape[1]).T
        expected += weight * features @ features[:3].T
    torch.testing.assert_close(torch.tensor(answer["scores"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores by dattri-llm's attributors with our projector, and what went into them. dattri is not there."""
    return in_process_with(DATTRI_LLM, tmp_path_factory.mktemp("llm"), LLM)


def projected(rows: list[list[list[float]]], update: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
    """Each parameter's gradient projected by the matrix of its size, one after the other: (N, parameters · K)."""
    parts = []
    for i in range(len(rows[0])):
        grads = torch.tensor([row[i] for row in rows], dtype=torch.float64)
        grads = grads if update is None else update(i, grads)
        parts.append(grads @ matrix("srht", 64, 5, size=grads.shape[1]).T)
    return torch.cat(parts, 1)


def test_dattri_llms_tracin_projects_with_ours(llm: dict[str, Any]) -> None:
    expected = projected(llm["train"]) @ projected(llm["test"]).T
    torch.testing.assert_close(torch.tensor(llm["tracin"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)


def test_dattri_llms_less_projects_with_ours(llm: dict[str, Any]) -> None:
    def adam(i: int, grads: Tensor) -> Tensor:
        m, v = torch.tensor(llm["adam"][i], dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * grads, 0.999 * v + 0.001 * grads**2
        return m / (1 - 0.9**7) / ((v / (1 - 0.999**7)).sqrt() + 1e-8)

    updates, queries = projected(llm["train"], adam), projected(llm["test"])
    expected = torch.nn.functional.normalize(updates) @ torch.nn.functional.normalize(queries).T
    torch.testing.assert_close(torch.tensor(llm["less"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)
