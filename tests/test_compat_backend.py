"""The backend for front ends meets its protocol, and a live optimizer's state is the one that it would save."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.live_training import BETAS, EPS, adamw, close, exact_features, exact_updates, moments, step
from support.models import adapted, batch, causal_lm, gradients
from support.oracle import matrix

from less_fast import AdamState, FeatureExtractor, LessFastError, Projection
from less_fast.compat.backend import GradientBackend, LessFastBackend, adam_state, usable

PROJECTIONS = [
    Projection("srht", 128, seed=3, block=32),
    Projection("rademacher", 96, seed=3),
    Projection("sjlt", 100, seed=3, nnz=2),
]
KINDS = [projection.kind for projection in PROJECTIONS]
METHODS = ("layout", "set_precondition", "features", "project", "scores")


@pytest.fixture(scope="module")
def trained() -> tuple[Any, torch.optim.AdamW]:
    """A LoRA model and its optimizer after three steps."""
    model = adapted(causal_lm())
    optimizer = adamw(model)
    for seed in range(3):
        step(model, optimizer, batch(seed=seed))
    return model, optimizer


def test_the_protocol_has_five_methods_and_ours_have_their_signatures(trained: Any) -> None:
    public = [name for name in vars(GradientBackend) if not name.startswith("_")]
    assert sorted(public) == sorted(METHODS)
    assert isinstance(LessFastBackend(trained[0], PROJECTIONS[0]), GradientBackend)
    for name in METHODS:
        ours, asked = (inspect.signature(getattr(owner, name)) for owner in (LessFastBackend, GradientBackend))
        assert ours == asked, name


def test_what_lacks_a_method_is_no_backend() -> None:
    partial = type("Partial", (), {name: (lambda self: None) for name in METHODS[:-1]})
    assert not isinstance(partial(), GradientBackend)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=KINDS)
def test_a_changed_precondition_gives_the_bits_of_a_new_extractor(trained: Any, projection: Projection) -> None:
    model, optimizer = trained
    backend, data = LessFastBackend(model, projection), batch()
    for precondition in ("sgd", adam_state(optimizer, model), "sign", "sgd", adam_state(optimizer, model, "torch")):
        backend.set_precondition(precondition)
        expected = FeatureExtractor(model, projection, precondition)(data)
        assert torch.equal(backend.features(data), expected), precondition


@pytest.mark.parametrize("rule", ["less", "torch"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=KINDS)
def test_features_are_those_of_float64(trained: Any, projection: Projection, rule: str) -> None:
    model, optimizer = trained
    backend, data = LessFastBackend(model, projection), batch()
    assert close(backend.features(data).numpy(), exact_features(model, backend.layout(), data, projection))
    backend.set_precondition(adam_state(optimizer, model, rule))
    state = moments(model, optimizer)
    exact = exact_features(model, backend.layout(), data, projection, state, rule)
    assert close(backend.features(data).numpy(), exact, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=KINDS)
def test_project_makes_of_gradients_what_features_are(trained: Any, projection: Projection, dtype: torch.dtype) -> None:
    model, optimizer = trained
    backend = LessFastBackend(model, projection)
    layout = backend.layout()
    grads = gradients(model, [p.name for p in layout.parameters], batch()).to(dtype)
    exact, pi = grads.double().numpy(), matrix(projection, layout)
    found = backend.project(grads)
    assert found.dtype == torch.float32 and close(found.numpy(), exact @ pi.T)
    backend.set_precondition(adam_state(optimizer, model))
    updates = exact_updates(exact, layout, moments(model, optimizer), "less")
    assert close(backend.project(grads).numpy(), updates @ pi.T)
    if dtype != torch.bfloat16:
        assert close(backend.project(grads).numpy(), backend.features(batch()).numpy(), 1e-4)


def test_project_refuses_what_does_not_fit_the_layout(trained: Any) -> None:
    backend = LessFastBackend(trained[0], PROJECTIONS[0])
    size = backend.layout().size
    for wrong in (torch.zeros(2, size + 1), torch.zeros(size), torch.zeros(2, size, dtype=torch.int64)):
        with pytest.raises(LessFastError, match=f"expected floating-point .N, {size}."):
            backend.project(wrong)
    assert backend.project(torch.zeros(0, size)).shape == (0, 128)


def test_scores_are_cosines_and_do_not_depend_on_neighbours() -> None:
    backend = LessFastBackend(adapted(causal_lm()), PROJECTIONS[0])
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(9, 128, generator=generator) * 10.0 ** torch.arange(-12, 15, 3)[:, None]
    targets = torch.randn(5, 128, generator=generator)
    train[2], train[5, 7], train[6, 0] = 0.0, float("nan"), float("inf")
    found = backend.scores(train, targets)
    assert found.dtype == torch.float32 and found.shape == (9, 5)
    wide, queries = train.double().numpy(), targets.double().numpy()
    with np.errstate(invalid="ignore"):
        exact = wide @ queries.T / np.linalg.norm(wide, axis=1)[:, None] / np.linalg.norm(queries, axis=1)
    bad = [2, 5, 6]
    assert usable(train).tolist() == [n not in bad for n in range(9)]
    assert (found[bad] == -torch.inf).all()
    good = [n for n in range(9) if n not in bad]
    np.testing.assert_allclose(found[good], exact[good], atol=1e-6)
    assert all(torch.equal(backend.scores(train[n : n + 1], targets)[0], found[n]) for n in range(9))


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float64, 1e200),
        (torch.float64, 1e308),
        (torch.float64, 1e-60),
        (torch.float64, 1e-300),
        (torch.float32, 1e38),
        (torch.float32, 1e-38),
        (torch.float16, 1e4),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e38),
    ],
)
def test_scores_do_not_depend_on_magnitudes(dtype: torch.dtype, magnitude: float) -> None:
    backend = LessFastBackend(adapted(causal_lm()), PROJECTIONS[0])
    generator = torch.Generator().manual_seed(0)
    train, targets = (
        ((2 * torch.rand(n, 128, generator=generator, dtype=torch.float64) - 1) * magnitude).to(dtype) for n in (7, 4)
    )
    assert usable(train).all() and usable(targets).all()
    units = [rows.double().numpy() / float(rows.double().abs().max()) for rows in (train, targets)]
    train_units, target_units = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in units)
    np.testing.assert_allclose(backend.scores(train, targets), train_units @ target_units.T, atol=1e-6)


def test_scores_of_the_largest_and_smallest_rows() -> None:
    backend = LessFastBackend(adapted(causal_lm()), PROJECTIONS[0])
    row = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).sign()
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        for magnitude in (limits.max, limits.tiny, limits.smallest_normal * limits.eps):
            assert torch.allclose(backend.scores(row.to(dtype) * magnitude, row), torch.ones(1, 1)), (dtype, magnitude)


def test_scores_refuse_unusable_targets_and_other_widths() -> None:
    backend = LessFastBackend(adapted(causal_lm()), PROJECTIONS[0])
    targets = torch.ones(3, 128)
    targets[1] = 0.0
    with pytest.raises(LessFastError, match="target row 1 of 3 is zero or not finite"):
        backend.scores(torch.ones(2, 128), targets)
    with pytest.raises(LessFastError, match=r"expected .N, K. and .M, K. of one K"):
        backend.scores(torch.ones(2, 127), targets)


@pytest.mark.parametrize("rule", ["less", "torch"])
@pytest.mark.parametrize("form", ["optimizer", "accelerated", "state"])
def test_a_live_state_is_what_would_be_read_from_its_checkpoint(
    trained: Any, form: str, rule: str, tmp_path: Path
) -> None:
    model, optimizer = trained
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = AdamState.from_checkpoint(tmp_path, model, rule)
    before = len(optimizer.state)
    if form == "state":
        if rule == "torch":
            with pytest.raises(LessFastError, match="no beta1 in its groups"):
                adam_state(optimizer.state, model, rule)
            return
        live = adam_state(optimizer.state, model, rule)
    elif form == "accelerated":
        from accelerate import Accelerator

        live = adam_state(Accelerator(cpu=True).prepare_optimizer(optimizer), model, rule)
    else:
        live = adam_state(optimizer, model, rule)
    assert live.to_dict() == saved.to_dict()
    assert len(optimizer.state) == before  # asking a defaultdict for frozen weights would have added entries


def test_a_copy_stays_and_a_view_moves_with_the_optimizer() -> None:
    model = adapted(causal_lm())
    optimizer = adamw(model)
    step(model, optimizer, batch())
    copied, view = (adam_state(optimizer, model, copy=copy) for copy in (True, False))
    before, name = moments(model, optimizer), next(iter(copied.moments))
    step(model, optimizer, batch(seed=1))
    after = moments(model, optimizer)
    assert torch.equal(copied.moments[name].m, before[name][0]) and not torch.equal(before[name][0], after[name][0])
    assert torch.equal(view.moments[name].m, after[name][0])


def test_an_optimizer_without_a_step_is_refused_or_taken_as_zeros() -> None:
    model = adapted(causal_lm())
    optimizer = adamw(model)
    with pytest.raises(LessFastError, match=r"state is empty.*after its first step"):
        adam_state(optimizer, model)
    with pytest.raises(LessFastError, match="state is empty"):
        adam_state(optimizer.state, model)
    empty = adam_state(optimizer, model, "torch", allow_empty=True)
    assert (empty.beta1, empty.beta2, empty.eps) == (*BETAS, EPS)
    assert set(empty.moments) == {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(LessFastError, match="empty"):
        adam_state(optimizer, adapted(causal_lm()), allow_empty=True)
    backend, data = LessFastBackend(model, PROJECTIONS[1], empty), batch()
    zeros = {
        name: (torch.zeros(p.shape), torch.zeros(p.shape), 0) for name, p in model.named_parameters() if "lora_" in name
    }
    exact = exact_features(model, backend.layout(), data, PROJECTIONS[1], zeros, "torch")
    # Adam's first update is nearly the sign, which turns where a gradient is no larger than its rounding.
    found = backend.features(data).numpy()
    cosines = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    assert (cosines > 0.999).all()


def test_a_matrix_without_a_gradient_so_far_has_zeros_and_one_that_is_not_trained_is_named() -> None:
    model = adapted(causal_lm())
    optimizer = adamw(model)
    late = next(name for name, p in model.named_parameters() if p.requires_grad)
    model(**batch()).loss.backward()
    model.get_parameter(late).grad = None
    optimizer.step()
    live = adam_state(optimizer, model, "torch", allow_empty=True)
    assert live.moments[late].step == 0 and not live.moments[late].m.any() and not live.moments[late].v.any()
    assert all(entry.step == 1 for name, entry in live.moments.items() if name != late)
    backend = LessFastBackend(model, PROJECTIONS[1], live)
    with pytest.raises(LessFastError, match=f"live optimizer has no moments of {late}"):
        backend.set_precondition(adam_state(optimizer, model))


def test_states_of_others_are_refused() -> None:
    model = adapted(causal_lm())
    trainable = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
    with pytest.raises(LessFastError, match="SGD"):
        adam_state(sgd, model, allow_empty=True)
    step(model, sgd, batch())
    with pytest.raises(LessFastError, match="SGD"):
        adam_state(sgd, model)
    other = adamw(model)
    step(model, other, batch())
    with pytest.raises(LessFastError, match="none of the model parameters"):
        adam_state(other, adapted(causal_lm()))
    with pytest.raises(LessFastError, match=r"expected one of torch.optim, or its state"):
        adam_state([1], model)
    several = torch.optim.AdamW([{"params": trainable[:1]}, {"params": trainable[1:], "eps": 1e-3}], lr=0.1)
    step(model, several, batch())
    with pytest.raises(LessFastError, match="several values of eps"):
        adam_state(several, model, "torch")
    assert adam_state(several, model).eps == 1e-8
