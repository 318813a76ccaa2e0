"""The fused gradient, rule and SJLT against float64, interpreted (and on a GPU where one is)."""

from __future__ import annotations

import pytest
import torch
from support.outer import RULES, Case, assert_close
from support.triton_run import Run, interpreted, kernels, require_triton, runners

require_triton()


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("short", "is_lora_b"), [(1, False), (16, False), (5, True)])
def test_rules_and_orientations(run: Run, short: int, is_lora_b: bool, rule: str) -> None:
    case = Case(short, 137, 50, rule_name=rule, is_lora_b=is_lora_b, nnz=1)
    assert_close(case.features(run), case)


@pytest.mark.parametrize(("short", "long", "dim", "nnz"), [(137, 64, 64, 3), (8, 1, 7, 2), (3, 200, 1, 1)])
def test_shapes(run: Run, short: int, long: int, dim: int, nnz: int) -> None:
    case = Case(short, long, dim, lengths=(33, 1), nnz=nnz)
    assert_close(case.features(run), case)


def test_half_precision_operands(run: Run) -> None:
    case = Case(16, 137, 50, dtype=torch.float16, nnz=1)
    assert_close(case.features(run), case)


def test_equal_calls_give_equal_bits_and_neighbours_are_not_felt(run: Run) -> None:
    for rule in ("less", "none"):
        case = Case(16, 150, 64, rule_name=rule, lengths=(40, 7, 90), nnz=2)
        features = case.features(run)
        assert torch.equal(features, case.features(run))
        alone = Case(16, 150, 64, rule_name=rule, lengths=(7,), nnz=2)
        alone.left, alone.right, alone.rule = case.left[40:47].clone(), case.right[40:47].clone(), case.rule
        assert torch.equal(alone.features(run)[0], features[1])
        case.right[3, 5] = float("nan")
        case.left[47, 2] = float("inf")
        spoilt = case.features(run)
        assert torch.equal(spoilt[1], features[1])
        assert spoilt[[0, 2]].isnan().all()


def test_operands_of_any_scale(run: Run) -> None:
    """The unit comes from the operands: raw gradients from 1e-30 to 1e30 keep their precision."""
    for scale in (1e-15, 1.0, 1e15):
        case = Case(16, 137, 50, rule_name="none", lengths=(9, 4), nnz=1)
        case.left *= scale
        case.right *= scale
        assert_close(case.features(run), case)


def test_no_update_exceeds_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(16, 137, generator=generator) * torch.logspace(-6, 3, 137)
    b = torch.rand(16, 137, generator=generator) ** 8 + 1e-12
    for e in (0.0, 1e-3):
        bound = float(kernels("outer_sjlt").update_bound(m, b, 0.1, 0.001, e))
        for scale in torch.logspace(-8, 8, 50):
            for g in (scale * m.sign(), scale * torch.randn(16, 137, generator=generator)):
                assert ((m + 0.1 * g) / (torch.sqrt(b + 0.001 * g * g) + e)).abs().max() <= bound


def test_no_update_exceeds_its_bound_without_a_first_moment() -> None:
    bound = float(kernels("outer_sjlt").update_bound(torch.zeros(1, 4), torch.full((1, 4), 1e-8), 0.1, 0.001, 0.0))
    g = torch.tensor([1e-3, 1.0, 1e3, 1e6])
    assert (0.1 * g / torch.sqrt(1e-8 + 0.001 * g * g)).max() <= bound


def test_gradients_of_equal_operands_do_not_overflow_their_unit(run: Run) -> None:
    """Every entry is as large as the bound allows: tokens times the largest operands."""
    case = Case(16, 64, 50, rule_name="none", lengths=(90,), nnz=1)
    case.left, case.right = torch.ones_like(case.left), torch.full_like(case.right, 3.0)
    assert_close(case.features(run), case)


def test_no_examples() -> None:
    assert Case(16, 137, 50, lengths=(), nnz=1).features(interpreted).shape == (0, 50)
