"""Every Triton kernel compiled ahead of time for three architectures, within its budget of registers; tile choices."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from support.triton_run import kernels

accumulate, compiler, sjlt = kernels("accumulate"), kernels("compile"), kernels("sjlt")

# Registers a thread, for Triton 3.6 to 3.9. A change that breaks a budget is either a regression or a new budget.
BUDGETS = json.loads((Path(__file__).parent / "triton_budgets.json").read_text())
# Triton 3.6 keeps two words of this kernel on the stack; ptxas prefers that to fewer programs at a time.
STACK = {"gaussian": 8}
VARIANTS = {variant.name: variant for variant in compiler.variants()}
# Sizes that Triton turns into constants where they are 1: one example, a flat vector, K = 1, one slot.
MAY_BE_ONE = (
    *("n_examples", "n_short", "n_long", "n_runs", "n_entries", "n_slots", "n_groups", "n_steps", "n_chunks"),
    *("n_index", "n_words", "dim", "nnz", "grads_stride", "out_stride", "chunk_stride", "features_stride"),
)


def test_every_kernel_has_a_budget() -> None:
    assert set(BUDGETS) == set(VARIANTS)


@pytest.mark.parametrize("capability", compiler.CAPABILITIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_registers_stay_within_budget(name: str, capability: int) -> None:
    compiled = compiler.compile_variant(VARIANTS[name], capability)
    used = compiler.resources(compiled)
    assert used.registers <= BUDGETS[name][str(capability)]
    assert used.stack <= STACK.get(name, 0), "registers spill"
    assert used.local == 0
    assert used.shared <= 48 * 1024
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.[\w.:]*\.f(16|32|64)", ptx), "a float is added atomically"
    if name in ("srht_64", "srht_4096", "sjlt_largest", "sjlt_add"):
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), "gradients are not loaded as vectors"


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "srht_4096"])
def test_sizes_of_one_compile(name: str) -> None:
    variant = VARIANTS[name]
    ones = {argument: 1 for argument in MAY_BE_ONE if argument in variant.kernel.arg_names}
    assert ones
    smallest = dataclasses.replace(variant, constants={**variant.constants, **ones})
    assert compiler.resources(compiler.compile_variant(smallest, 90)).registers > 0


SHAPES = [(1, 1), (1, 65), (3, 137), (16, 4096), (128, 11008), (1, 2**27)]


@pytest.mark.parametrize("block", [1, 2, 64, 128, 1024, 4096])
def test_srht_tiles(block: int) -> None:
    for short, long in SHAPES:
        for dim in (block, 3 * block, 8192):
            tiles = [accumulate.config("srht", n, short, long, dim, block) for n in (1, 2, 3, 4, 100)]
            assert len({(tile.steps, tile.chunks) for tile in tiles}) == 1, "the order of additions depends on N"
            most = -(-short * -(-long // block) // (dim // block))  # runs of one slot
            assert tiles[0].steps * tiles[0].chunks >= most > tiles[0].steps * (tiles[0].chunks - 1)
            assert tiles[0].chunks <= 64
            for tile in tiles:
                assert tile.examples * tile.width * block <= max(2048, block)
                assert tile.examples & (tile.examples - 1) == tile.width & (tile.width - 1) == 0
                assert tile.width < 2 * (dim // block)


def test_dense_tiles() -> None:
    for short, long in SHAPES:
        tiles = [accumulate.config("dense", n, short, long, 8192) for n in (1, 16, 17, 100)]
        assert [tile.examples for tile in tiles] == [16, 16, 32, 32]
        assert len({(tile.steps, tile.chunks) for tile in tiles}) == 1, "the order of additions depends on N"
        total = -(-short * long // accumulate.DENSE_ENTRIES)
        assert tiles[0].steps * tiles[0].chunks >= total > tiles[0].steps * (tiles[0].chunks - 1)
        assert tiles[0].chunks <= 64


def test_fixed_point_never_overflows() -> None:
    for terms in (1, 2, 7, 2**20, 2**31 - 1, 3 * 2**31):
        bits = sjlt.fixed_point_bits(terms)
        assert terms * 2**bits < 2**62
        assert terms * 2 ** (bits + 2) >= 2**62  # no more than two bits are given away
    assert [sjlt.config(n) for n in (1, 2, 3, 100)] == [1, 2, 4, 4]
