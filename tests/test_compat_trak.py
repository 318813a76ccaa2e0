"""``less_fast.compat.trak.Projector``: its callers' calls, trak itself with it, and trak's tests unchanged."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import matrix
from support.upstream import packages, run_tests, sdist
from torch import Tensor, nn

from less_fast import LessFastError, Projection
from less_fast.compat import trak as ours
from less_fast.compat.trak import BasicProjector, CudaProjector, ProjectionType, Projector
from less_fast.layout import ParameterLayout

TRAK = "traker==0.3.2"
QUANDA = "quanda==0.5.0"
KINDS = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt", "srht": "srht"}


def expected(grads: Tensor, proj_type: str, dim: int, seed: int) -> Tensor:
    """√K·Π·g in float64, from the explicit matrix."""
    block = math.gcd(dim, 64) if proj_type == "srht" else 64
    projection = Projection(KINDS[proj_type], dim, seed, block=block)
    pi = matrix(projection, ParameterLayout.flat(grads.shape[1])) * math.sqrt(dim)
    return grads.double() @ torch.from_numpy(pi).T


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("proj_type", KINDS)
def test_features_have_the_size_of_trak_s(proj_type: str, dtype: torch.dtype) -> None:
    grads = draw(5, 700).to(dtype)
    found = Projector(700, 192, 3, proj_type).project(grads, model_id=0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(found, expected(grads, proj_type, 192, 3)) < 2e-6
    # The size: a sum of P random signs or normals has the norm of g, so K of them have √K times that.
    ratio = found.double().norm(dim=1) / (grads.double().norm(dim=1) * math.sqrt(192))
    assert float((ratio - 1).abs().max()) < 6 / math.sqrt(2 * 192)


# How each caller makes one: trak's TRAKer on a CPU and a GPU, LESS, DataFlex, AIS, quanda, and trak's own tests.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "TRAKer": ((), {"max_batch_size": 32, "dtype": torch.float16, "device": "cpu"}),
    "LESS": ((), {"max_batch_size": 16, "block_size": 128, "device": torch.device("cpu"), "dtype": torch.bfloat16}),
    "DataFlex": ((), {"max_batch_size": 8, "block_size": 128, "device": torch.device("cpu"), "dtype": torch.float16}),
    "AIS": ((), {"block_size": 2, "model_id": 0, "max_batch_size": 16, "device": "cpu", "dtype": torch.bfloat16}),
    "quanda": ((), {"device": torch.device("cpu")}),
    "by position": ((300, 64, 9, ProjectionType.rademacher, "cpu", 100, torch.float32, 0), {}),
}


@pytest.mark.parametrize("caller", CALLS)
@pytest.mark.parametrize("projector", [BasicProjector, CudaProjector])
def test_constructors_take_what_callers_pass(projector: type[Projector], caller: str) -> None:
    grads = draw(3, 300)
    arguments, keywords = CALLS[caller]
    if not arguments:
        keywords = {"grad_dim": 300, "proj_dim": 64, "seed": 9, "proj_type": ProjectionType.rademacher, **keywords}
    made = projector(*arguments, **keywords)
    assert (made.grad_dim, made.proj_dim, made.seed, made.proj_type) == (300, 64, 9, "rademacher")
    made.num_sms = max(made.num_sms // 2, 1)
    found = made.project(grads, 0)
    assert relative(found, expected(grads, "rademacher", 64, 9)) < 1e-6
    made.free_memory()
    assert torch.equal(made.project(grads, model_id=0), found)


def test_type_is_given_as_name_or_member() -> None:
    grads = draw(2, 90)
    for proj_type in KINDS:
        by_name = Projector(90, 32, 0, proj_type)
        by_member = Projector(90, 32, 0, ProjectionType(proj_type))
        assert by_name.proj_type == by_member.proj_type == proj_type and by_name.proj_type.value == proj_type
        assert json.loads(json.dumps({"type": by_name.proj_type})) == {"type": proj_type}  # trak's metadata
        assert torch.equal(by_name.project(grads, 0), by_member.project(grads, 0))
    assert Projector(90, 32).proj_type == "srht"


def test_dictionaries_are_laid_out_in_their_order() -> None:
    parts = {"b": draw(4, 3, 5), "scalar": draw(4, seed=1), "a": draw(4, 7, seed=2).half()}
    flat = torch.cat([parts["b"].reshape(4, 15), parts["scalar"][:, None], parts["a"].float()], dim=1)
    projector = Projector(23, 32, 1, "rademacher", "cpu")
    assert torch.equal(projector.project(parts, model_id=2), projector.project(flat, model_id=2))
    turned = dict(reversed(parts.items()))
    assert not torch.allclose(projector.project(turned, model_id=2), projector.project(flat, model_id=2))
    learnt = {"w": draw(2, 23).requires_grad_()}
    assert not projector.project(learnt, 0).requires_grad
    empty = {name: part[:0] for name, part in parts.items()}
    assert projector.project(empty, 0).shape == (0, 32)


def test_checkpoints_and_seeds_have_independent_matrices() -> None:
    grads = draw(1, 400)
    # trak's own key for (0, 1) is that of (10000, 0), and BasicProjector's that of (100000, 0).
    keys = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (10_000, 0), (100_000, 0), (2**32, 0)]
    rows = [Projector(400, 4096, seed, "rademacher").project(grads, model_id) for seed, model_id in keys]
    correlation = torch.corrcoef(torch.cat(rows)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4096)
    assert torch.equal(Projector(400, 4096, 1, "rademacher", model_id=1).project(grads), rows[4])
    assert torch.equal(Projector(400, 4096, np.int64(1), "rademacher").project(grads, 1), rows[4])


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(LessFastError, match="proj_type is 'na'; expected one of normal, rademacher, sjlt, srht"):
        Projector(10, 8, 0, "na")
    with pytest.raises(LessFastError, match="dim is 0"):
        Projector(10, 0)
    with pytest.raises(LessFastError, match="seed is -3"):
        Projector(10, 8, seed=-3)
    with pytest.raises(LessFastError, match=r"shape \(2, 11\); expected \(N, 10\)"):
        Projector(10, 8).project(draw(2, 11), 0)
    with pytest.raises(LessFastError, match="the gradients are an empty mapping"):
        Projector(0, 8).project({}, 0)
    assert Projector(0, 8).project(draw(2, 11), 0).shape == (2, 8)


def test_srht_has_the_widest_block_that_divides_its_features() -> None:
    for dim, block in ((2048, 64), (96, 32), (40, 8)):
        assert Projector(10, dim).projection(0) == Projection("srht", dim, 0, block=block)
    for dim in (1, 50, 2001):
        with pytest.raises(LessFastError, match=f"srht cannot mix dim = {dim} features well; expected a multiple of 8"):
            Projector(10, dim)
        assert Projector(10, dim, proj_type="rademacher").project(draw(2, 10)).shape == (2, dim)


# With trak itself.


@pytest.fixture
def trak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library as PyPI has it, imported for one test."""
    monkeypatch.syspath_prepend(str(packages(TRAK)))
    yield importlib.import_module("trak")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("trak", "quanda")]:
        del sys.modules[name]


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    return model.eval(), draw(40, 12, seed=4), torch.arange(40) % 3


def trak_scores(phi: Tensor, targets: Tensor, out_to_loss: np.ndarray) -> Tensor:
    """Φ (ΦᵀΦ)⁻¹ φ_target · q, the inverse divided by its mean magnitude as trak does: (N, N_target)."""
    inverse = torch.linalg.inv(phi.T @ phi)
    loss = torch.tensor(np.array(out_to_loss)).double().reshape(-1, 1)
    return (phi @ (inverse / inverse.abs().mean()) @ targets.T * loss).detach()


def test_traker_works_on_its_features(trak: Any, tmp_path: Path) -> None:
    model, x, y = model_and_data()
    size = sum(p.numel() for p in model.parameters())
    projector = Projector(size, 24, seed=5, device="cpu")
    options = {"task": "image_classification", "train_set_size": 40, "save_dir": tmp_path, "logging_level": 40}
    options |= {"device": "cpu", "use_half_precision": False}
    traker = trak.TRAKer(model, projector=projector, **options)
    for model_id in (0, 1):
        traker.load_checkpoint(model.state_dict(), model_id=model_id)
        for start in range(0, 40, 16):
            batch = x[start : start + 16], y[start : start + 16]
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    grads = traker.gradient_computer.compute_per_sample_grad(batch=(x, y))
    flat = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    phi = expected(flat, "srht", 24, 5) / math.sqrt(size)
    traker.saver.load_current_store(0)
    store = traker.saver.current_store
    torch.testing.assert_close(torch.tensor(store["grads"]).double(), phi, rtol=1e-4, atol=1e-5)

    # A second process goes on with what the first one saved; its projector's type has to be the same.
    again = trak.TRAKer(model, projector=Projector(size, 24, seed=5), **options)
    for model_id in (0, 1):
        again.start_scoring_checkpoint("targets", model.state_dict(), model_id, num_targets=6)
        again.score((x[:6], y[:6]), num_samples=6)
    scores = torch.tensor(again.finalize_scores("targets", model_ids=[0])).double()
    exact = trak_scores(phi, phi[:6], store["out_to_loss"])
    torch.testing.assert_close(scores, exact, rtol=5e-3, atol=5e-3 * float(exact.abs().max()))
    with pytest.raises(AssertionError, match="JL matrix"):
        trak.TRAKer(model, projector=Projector(size, 24, seed=5, proj_type="normal"), **options)


def test_trak_s_own_enumeration_and_chunks(trak: Any) -> None:
    projectors = importlib.import_module("trak.projectors")
    parts = {"a": draw(4, 30), "b": draw(4, 5, 4, seed=1), "c": draw(4, 11, seed=2)}
    for kind in projectors.ProjectionType:
        made = Projector(61, 20, 0, kind, "cpu")
        assert made.proj_type == kind
        vector = importlib.import_module("trak.utils").vectorize(parts, device="cpu")
        assert torch.equal(made.project(parts, 0), made.project(vector, 0))
        chunks = [Projector(size, 20, seed, kind, "cpu", max_batch_size=8) for size, seed in ((50, 3), (11, 4))]
        chunked = projectors.ChunkedCudaProjector(chunks, 50, [50, 11], 4, "cpu", torch.float32)
        exact = expected(vector[:, :50], kind.value, 20, 3) + expected(vector[:, 50:], kind.value, 20, 4)
        assert relative(chunked.project(parts, 0), exact) < 1e-6
        chunked.free_memory()


def test_install_replaces_trak_s_classes(trak: Any, tmp_path: Path) -> None:
    projectors = importlib.import_module("trak.projectors")
    kept = projectors.NoOpProjector, projectors.ChunkedCudaProjector
    ours.install()
    assert projectors.BasicProjector is projectors.CudaProjector is projectors.BasicSingleBlockProjector is Projector
    assert (projectors.NoOpProjector, projectors.ChunkedCudaProjector) == kept
    assert isinstance(Projector(3, 8), projectors.AbstractProjector)
    assert all(callable(getattr(Projector, name)) for name in projectors.AbstractProjector.__abstractmethods__)
    model, _, _ = model_and_data()
    options = {"task": "image_classification", "train_set_size": 40, "save_dir": tmp_path, "logging_level": 60}
    traker = trak.TRAKer(model, device="cpu", proj_dim=20, projector_seed=8, **options)
    assert isinstance(traker.projector, Projector)
    assert (traker.projector.proj_type, traker.projector.seed) == ("normal", 8)


def test_install_without_trak_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trak", None)
    with pytest.raises(LessFastError, match="pip install traker") as raised:
        ours.install()
    assert "\n" not in str(raised.value)


# quanda's wrapper. Its package imports every attribution library there is; its own modules need four of them.


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="quanda needs Python 3.12 or older")
def test_quanda_s_wrapper_uses_it(trak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.install()
    root = packages(QUANDA) / "quanda"
    for name in ("", ".explainers", ".explainers.wrappers", ".utils"):  # packages without what they import
        package = types.ModuleType(f"quanda{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    lightning = types.ModuleType("lightning")  # the wrapper names a class of it in annotations
    lightning.LightningModule = type("LightningModule", (nn.Module,), {})
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    wrapper = importlib.import_module("quanda.explainers.wrappers.trak_wrapper")

    model, x, y = model_and_data()
    data = torch.utils.data.TensorDataset(x, y)
    explainer = wrapper.TRAK(
        model, data, model_id="tiny", cache_dir=str(tmp_path), projector="basic", proj_dim=10, seed=42, batch_size=16
    )
    assert isinstance(explainer.traker.projector, Projector)
    found = explainer.explain(x[:6], y[:6])
    grads = explainer.traker.gradient_computer.compute_per_sample_grad(batch=(x, y))
    flat = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    phi = expected(flat, "normal", 10, 42) / math.sqrt(flat.shape[1])
    exact = trak_scores(phi, phi[:6], explainer.traker.saver.current_store["out_to_loss"]).T
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=5e-3 * float(exact.abs().max()))


# trak's tests of its main class, unchanged. The plugin puts ours in place and makes trak's own unusable.

PLUGIN = """
import sys
from pathlib import Path

import torch
import trak.projectors
from less_fast.compat import trak as ours

try:
    import torchvision
except RuntimeError:
    # PyPI's build is for a torch with CUDA. Without its operators it cannot be imported; no model here calls them.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]

theirs = [trak.projectors.BasicSingleBlockProjector, trak.projectors.BasicProjector, trak.projectors.CudaProjector]
ours.install()


def refuse(self, *args, **kwargs):
    raise AssertionError(f"trak's own {type(self).__name__} was made")


for projector in theirs:
    projector.__init__ = refuse

calls = Path(__file__).with_name("calls")
calls.touch()
project = ours.Projector.project


def counted(self, grads, model_id=None):
    with calls.open("a") as file:
        print(self.grad_dim, self.proj_dim, self.proj_type.value, file=file)
    return project(self, grads, model_id)


ours.Projector.project = counted
"""

CPU_TESTS = {
    "test_class_init_cpu",
    "test_class_init",
    "test_load_ckpt",
    "test_load_ckpt_repeat",
    "test_class_featurize_cpu",
    "test_class_featurize_noop",
    "test_custom_model_output",
    "test_iterative_gradient_computer",
    "test_grad_wrt_last_layer",
}


def upstream_outcomes(folder: Path, *options: str) -> tuple[dict[str, str], list[str]]:
    """Outcomes of test_class.py, and a line for each projection that ours made."""
    (folder / "projector_by_less_fast.py").write_text(PLUGIN)
    path = [folder, packages(TRAK), packages("torchvision==0.28.0")]
    test = sdist(TRAK) / "tests" / "test_class.py"
    outcomes = run_tests([test], path, "-p", "projector_by_less_fast", *options, timeout=590)
    return outcomes, (folder / "calls").read_text().splitlines()


def test_upstream_tests_pass_unchanged(tmp_path: Path) -> None:
    outcomes, calls = upstream_outcomes(tmp_path, "-m", "not cuda")
    assert outcomes == dict.fromkeys(CPU_TESTS, "passed")
    assert sorted(calls) == ["11689512 20 rademacher", "513000 2048 normal", "513000 2048 normal"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_upstream_tests_pass_unchanged_on_a_gpu(tmp_path: Path) -> None:
    outcomes, _ = upstream_outcomes(tmp_path)
    assert len(outcomes) > len(CPU_TESTS)
    assert {test: outcome for test, outcome in outcomes.items() if outcome != "passed"} == {}
