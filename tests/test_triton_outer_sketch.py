"""The fused gradient, rule and blocked SRHT against float64, interpreted (and on a GPU where one is); its plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.triton_run import Run, kernels, runners
from torch import Tensor

from less_fast.layout import Parameter, ParameterLayout
from less_fast.ops.accumulate import accumulate
from less_fast.ops.outer_sketch import sum_lanes
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

outer_sketch = kernels("outer_sketch")

LENGTHS = (3, 0, 70, 1, 33)
RULES = ("none", "sign", "less", "torch")
SEED = 2**40 + 3


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


@dataclass
class Case:
    """One matrix (S, L) behind another in a layout, and the operands of some examples."""

    short: int
    long: int
    dim: int
    block: int = 64
    rule_name: str = "less"
    lengths: tuple[int, ...] = LENGTHS
    dtype: torch.dtype = torch.float32
    is_lora_b: bool = False
    left: Tensor = field(init=False)
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.short * self.long)
        tokens = sum(self.lengths)
        self.left = torch.randn(tokens, self.short, generator=generator).to(self.dtype)
        self.right = torch.randn(tokens, self.long, generator=generator).to(self.dtype)
        shape = (self.long, self.short) if self.is_lora_b else (self.short, self.long)
        name = "q.lora_B.default.weight" if self.is_lora_b else "q.lora_A.default.weight"
        layout = ParameterLayout.build([("p.lora_A.default.weight", 5, 3 * self.block), (name, *shape)])
        self.parameter: Parameter = layout.parameters[1]
        self.run_base = layout.run_bases(self.block)[1]
        self.projection = Projection("srht", self.dim, seed=SEED, block=self.block)
        self.rule = NONE if self.rule_name == "none" else Rule(self.rule_name)
        if self.rule_name in ("less", "torch"):
            m = torch.randn(self.short, self.long, generator=generator)
            v = torch.rand(self.short, self.long, generator=generator)
            e = 0.0 if self.rule_name == "less" else 1e-3
            self.rule = Rule("adam", 0.9 * m, 0.999 * v + 1e-8, 0.1, 0.001, e)

    def starts(self) -> list[int]:
        return [sum(self.lengths[:n]) for n in range(len(self.lengths))]

    def lanes(self) -> Tensor:
        cut = outer_sketch.plan(self.short, self.long, self.dim, self.block)
        return torch.zeros(cut.lanes, len(self.lengths), self.dim)

    def launch(self, run: Run, lanes: Tensor, tile: Any = None) -> Tensor:
        signs = run(
            "outer_sketch.sign_table",
            self.run_base,
            self.parameter.runs(self.block),
            self.block,
            SEED,
            torch.device("cpu"),
        )
        table = torch.tensor([self.starts(), self.lengths], dtype=torch.int32)
        place = table[0], table[1], signs, self.run_base, self.block
        rule = self.rule.code, self.rule.a, self.rule.b, self.rule.alpha, self.rule.gamma, self.rule.e
        run("outer_sketch.outer_sketch", lanes, self.left, self.right, *place, *rule, tile)
        return lanes

    def features(self, run: Run, tile: Any = None) -> Tensor:
        return sum_lanes(self.launch(run, self.lanes(), tile))

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """From the operands as they are: explicit gradients, then the reference's sketch."""
        pieces = [slice(s, s + length) for s, length in zip(self.starts(), self.lengths)]
        grads = torch.stack([self.left[p].to(dtype).T @ self.right[p].to(dtype) for p in pieces])
        features = torch.zeros(len(self.lengths), self.dim, dtype=dtype)
        accumulate(features, grads, self.parameter, self.run_base, self.projection, self.rule, backend="reference")
        return features


def assert_close(got: Tensor, case: Case, relative: float = 1e-6) -> None:
    """Each row's error is at most twice that of plain torch in float32 and ``relative`` of its norm."""
    for row, wanted, plain in zip(got.double(), case.expected(), case.expected(torch.float32).double()):
        assert (row - wanted).norm() <= 2 * (plain - wanted).norm() + relative * wanted.norm()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("short", [1, 3, 16])
def test_small_ranks(run: Run, short: int, rule: str) -> None:
    case = Case(short, 137, 256, rule_name=rule)
    assert_close(case.features(run), case)


@pytest.mark.parametrize(
    ("short", "long", "dim", "block"),
    [
        (8, 640, 1024, 64),  # eight phases, one lane
        (64, 1100, 512, 64),  # more short indices than slots
        (128, 200, 8192, 64),  # as many
        (137, 137, 512, 16),  # an odd rank: several launches
        (256, 70, 256, 32),
        (5, 137, 256, 128),
        (12, 300, 64, 64),  # one slot
    ],
)
def test_shapes(run: Run, short: int, long: int, dim: int, block: int) -> None:
    case = Case(short, long, dim, block, lengths=(33, 1))
    assert_close(case.features(run), case)


@pytest.mark.parametrize("rule", RULES)
def test_lora_b(run: Run, rule: str) -> None:
    case = Case(16, 137, 256, rule_name=rule, is_lora_b=True)
    assert case.parameter.rows == 137
    assert_close(case.features(run), case)


def test_half_precision_operands(run: Run) -> None:
    """Operands are exact, their products are added in float32, u is rounded to 16 bits: 2^-17 at most."""
    case = Case(16, 137, 256, dtype=torch.float16)
    assert_close(case.features(run), case, 1e-5)


def test_every_tile_gives_the_same(run: Run) -> None:
    case = Case(64, 400, 512, lengths=(70, 3))
    for tile in ((64, 32, 1, 4, 2), (64, 64, 2, 8, 3), (32, 64, 1, 4, 3), (128, 64, 2, 8, 3), (16, 16, 1, 4, 2)):
        assert_close(case.features(run, outer_sketch.Tile(*tile)), case)


def test_equal_calls_give_equal_bits_and_neighbours_are_not_felt(run: Run) -> None:
    case = Case(16, 300, 512, lengths=(40, 7, 90))
    features = case.features(run)
    assert torch.equal(features, case.features(run))
    alone = Case(16, 300, 512, lengths=(7,))
    alone.left, alone.right, alone.rule = case.left[40:47].clone(), case.right[40:47].clone(), case.rule
    assert torch.equal(alone.features(run)[0], features[1])
    case.right[3, 5] = float("nan")
    case.left[47, 2] = float("inf")
    spoilt = case.features(run)
    assert torch.equal(spoilt[1], features[1])
    assert not spoilt[0].isfinite().all()
    assert not spoilt[2].isfinite().all()


def test_it_adds_and_touches_nothing_else(run: Run) -> None:
    case = Case(16, 137, 256, lengths=(5, 9))
    once = case.features(run)
    lanes = case.launch(run, case.launch(run, case.lanes()))
    torch.testing.assert_close(sum_lanes(lanes), 2 * once, rtol=1e-6, atol=1e-6)
    wide = torch.full((case.lanes().shape[0] + 2, 2, 256), 7.0)
    case.launch(run, wide)
    assert torch.equal(wide[-2:], torch.full((2, 2, 256), 7.0))
    case.lengths = (4, 9)  # the row of the first example's last token is nobody's now
    case.left[4] = float("nan")
    table = torch.tensor([[0, 5], [4, 9]], dtype=torch.int32)
    case.starts = lambda: table[0].tolist()  # type: ignore[method-assign]
    assert case.features(run).isfinite().all()


def test_operands_may_be_columns_of_something_wider(run: Run) -> None:
    case = Case(16, 137, 256, lengths=(5, 9))
    expected = case.features(run)
    wide = torch.full((14, 300), float("nan"))
    wide[:, 48:185] = case.right
    case.right = wide[:, 48:185]
    assert torch.equal(case.features(run), expected)


def test_no_examples(run: Run) -> None:
    case = Case(16, 137, 256, lengths=())
    assert case.features(run).shape == (0, 256)


SHAPES = [(s, long) for s in (1, 2, 3, 8, 12, 16, 64, 100, 128, 137, 255, 256) for long in (1, 64, 137, 4096)]


@pytest.mark.parametrize(("short", "long"), SHAPES)
def test_plans_cover_every_run_once_and_no_two_programs_share_a_number(short: int, long: int) -> None:
    for dim, block in ((64, 64), (512, 64), (8192, 64), (8192, 16)):
        cut = outer_sketch.plan(short, long, dim, block)
        slots, columns = dim // block, -(-long // block)
        done = set()
        for first in range(0, cut.stride, cut.phases):
            owned = set()
            for phase in range(first, min(first + cut.phases, cut.stride)):
                for s in range(short):
                    run = phase * short + s
                    layer = run // slots - first * short // slots
                    assert 0 <= layer < cut.layers
                    owned.add((layer, run % slots))
                    for step in range(cut.steps * cut.chunks):
                        q = phase + step * cut.stride
                        if q < columns:
                            assert (q * short + s) % slots == run % slots
                            done.add((q, s))
            assert len(owned) == short * (min(first + cut.phases, cut.stride) - first)
        assert len(done) == short * columns
        assert cut.steps * (cut.chunks - 1) * cut.stride < columns or cut.chunks == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_are_powers_of_two_that_hold_small_ranks_whole(dtype: torch.dtype) -> None:
    for capability in (80, 90, 100):
        for short in range(1, 257):
            tile = outer_sketch.config(short, dtype, capability)
            assert tile.rows in (16, 32, 64, 128)
            assert tile.rows >= min(short, 32)
            assert tile.warps in (4, 8)


def test_what_it_refuses() -> None:
    assert outer_sketch.refuses(16, 4096, 64) is None
    assert "block" in outer_sketch.refuses(16, 4096, 8)
    assert "entries" in outer_sketch.refuses(2**15, 2**16, 64)
