"""The fused gradient, rule and blocked SRHT against float64, interpreted (and on a GPU where one is); its plans."""

from __future__ import annotations

import pytest
import torch
from support.outer import RULES, Case, assert_close
from support.triton_run import Run, kernels, on_cuda, runners

from less_fast.ops.outer_sketch import sum_lanes

outer_sketch = kernels("outer_sketch")


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_lora_b", [False, True], ids=["A", "B"])
@pytest.mark.parametrize("short", [8, 16, 64, 128, 256])
def test_half_precision_on_a_device(short: int, is_lora_b: bool, dtype: torch.dtype) -> None:
    """Every width of tile, several runs of each slot; the interpreter has no bfloat16."""
    case = Case(short, 2200, 8192, dtype=dtype, is_lora_b=is_lora_b, lengths=(371, 1, 0, 90))
    assert_close(case.features(on_cuda), case, 1e-5)


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
    assert outer_sketch.refuses(16, 4096) is None
    assert "entries" in outer_sketch.refuses(2**15, 2**16)
    assert outer_sketch.refuses_block(64) is None
    assert "block" in outer_sketch.refuses_block(8)
