"""Every Triton kernel compiled ahead of time for three architectures, within its budget of registers; tile choices."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_run import kernels

compiler, dense, lists, sjlt, srht = (kernels(name) for name in ("compile", "dense", "variants", "sjlt", "srht"))

# Registers a thread, for Triton 3.6 to 3.9. A change that breaks a budget is either a regression or a new budget.
BUDGETS = json.loads((Path(__file__).parent / "triton_budgets.json").read_text())
# Bytes of the stack, two or four words, that ptxas prefers to fewer programs at a time, for Triton 3.6 or for 3.9.
STACK = {("srht_128_fp32", 90): 8, ("srht_4096_fp32_adam", 100): 8, ("rademacher_fp32", 100): 8}
STACK |= {("gaussian_bf16", 100): 16}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program can have
VARIANTS = {capability: {v.name: v for v in lists.variants(capability)} for capability in compiler.CAPABILITIES}
CASES = [(name, c) for c in compiler.CAPABILITIES for name in VARIANTS[c]]
SMALLEST = {variant.kernel: variant for variant in VARIANTS[90].values()}.values()
# Sizes that Triton turns into constants where they are 1: one example, a flat vector, K = 1, one slot.
MAY_BE_ONE = (
    *("n_examples", "n_short", "n_long", "n_entries", "n_slots", "n_groups", "n_steps", "n_chunks", "n_programs"),
    *("n_index", "n_words", "dim", "nnz", "grads_stride", "out_stride", "chunk_stride", "features_stride"),
    *("width", "x_stride", "right_stride", "n_rows", "n_queries", "n_tiles", "row_length", "row_stride"),
)
VECTOR_LOAD = r"\bld\.global[\w.:]*\.v4\.b32|\bcp\.async\.c[ag]\.shared\.global[^;]*, 0x10"
# Triton 3.6 multiplies int8 on a B200 as an A100 does.
PRODUCT = {80: r"\b[HI]MMA\.", 90: r"\b[HI]GMMA\.", 100: r"\bUTC\w*MMA\b|\bIMMA\."}


def test_every_kernel_has_a_budget() -> None:
    assert all(set(BUDGETS) == set(VARIANTS[capability]) for capability in compiler.CAPABILITIES)


@pytest.mark.parametrize("name, capability", CASES)
def test_registers_stay_within_budget(name: str, capability: int) -> None:
    variant = VARIANTS[capability][name]
    compiled = compiler.compile_variant(variant, capability)
    used = compiler.resources(compiled)
    assert used.registers <= BUDGETS[name][str(capability)]
    assert used.stack <= STACK.get((name, capability), 0), "registers spill"
    assert used.local == 0
    assert used.shared <= SHARED[capability]
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.[\w.:]*\.f(16|32|64)", ptx), "a float is added atomically"
    if variant.vectors:
        assert re.search(VECTOR_LOAD, ptx), "gradients are not loaded as vectors"
    if variant.products:
        pattern = PRODUCT[80 if variant.narrow else capability]
        assert re.search(pattern, compiler.disassembly(compiled)), "no tensor core multiplies"


@pytest.mark.parametrize("variant", SMALLEST, ids=lambda variant: variant.name)
def test_sizes_of_one_compile(variant: Any) -> None:
    ones = {argument: 1 for argument in MAY_BE_ONE if argument in variant.kernel.arg_names}
    assert ones
    smallest = dataclasses.replace(variant, constants={**variant.constants, **ones})
    assert compiler.resources(compiler.compile_variant(smallest, 90)).registers > 0


SHAPES = [(1, 1), (1, 65), (3, 137), (16, 4096), (128, 11008), (1, 2**27), (1, 2**36)]


@pytest.mark.parametrize("block", [1, 2, 16, 64, 128, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_srht_tiles(block: int, dtype: torch.dtype) -> None:
    for capability in compiler.CAPABILITIES:
        for short, long in SHAPES:
            for dim in (block, 3 * block, 8192):
                runs, slots = short * -(-long // block), dim // block
                examples = (1, 2, 3, 4, 16, 33, 100)
                tiles = [srht.config(n, short, long, dim, block, 0, dtype, capability) for n in examples]
                alike = {(tile.mixing, tile.steps, tile.chunks, tile.warps) for tile in tiles}
                assert len(alike) == 1 or tiles[0].mixing == srht.BUTTERFLIES, "the order of additions depends on N"
                assert len({(tile.steps, tile.chunks) for tile in tiles}) == 1, "the order of additions depends on N"
                most = -(-runs // slots)
                assert tiles[0].steps * tiles[0].chunks >= most > tiles[0].steps * (tiles[0].chunks - 1)
                assert tiles[0].chunks <= 64
                for tile in tiles:
                    assert tile.examples & (tile.examples - 1) == tile.slots & (tile.slots - 1) == 0
                    assert tile.slots < 2 * slots
                    if tile.mixing == srht.BUTTERFLIES:
                        assert tile.examples * tile.slots * block <= max(2048, block)
                    else:
                        assert tile.examples * tile.slots == (64 if block >= 64 else 128), "another product"


def test_runs_are_mixed_by_products_where_these_are_exact_enough() -> None:
    def mixing(block: int, mode: int, dtype: torch.dtype, capability: int) -> int:
        chosen: int = srht.config(16, 1, 2**20, 8192, block, mode, dtype, capability).mixing
        return chosen

    for block in (16, 32, 64, 128):
        assert mixing(block, 0, torch.bfloat16, 80) == mixing(block, 1, torch.float16, 90) == srht.PRODUCT
        assert mixing(block, 0, torch.float32, 90) == mixing(block, 2, torch.bfloat16, 90) == srht.SPLIT_PRODUCT
        assert mixing(block, 0, torch.float32, 80) == srht.BUTTERFLIES
    assert mixing(8, 0, torch.bfloat16, 90) == mixing(256, 0, torch.bfloat16, 90) == srht.BUTTERFLIES


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("mode, dtype", [(0, torch.bfloat16), (2, torch.bfloat16), (0, torch.float32)], ids=str)
def test_dense_tiles(kind: str, mode: int, dtype: torch.dtype) -> None:
    for capability in compiler.CAPABILITIES:
        for short, long in SHAPES:
            tiles = [dense.config(n, short * long, kind, mode, dtype, capability) for n in (1, 16, 17, 32, 100)]
            assert [tile.examples for tile in tiles[:4]] == [16, 16, 32, 32]
            assert len({(tile.entries, tile.steps, tile.chunks) for tile in tiles}) == 1, "the order depends on N"
            total = -(-short * long // tiles[0].entries)
            assert tiles[0].steps * tiles[0].chunks >= total > tiles[0].steps * (tiles[0].chunks - 1)
            assert tiles[0].chunks <= 64
            assert tiles[0].exact == (mode == 0 and dtype == torch.bfloat16)


def test_fixed_point_never_overflows() -> None:
    for terms in (1, 2, 7, 2**20, 2**31 - 1, 3 * 2**31, 2**37):
        bits = sjlt.fixed_point_bits(terms)
        assert terms * 2**bits < 2**62
        assert terms * 2 ** (bits + 2) >= 2**62  # no more than two bits are given away
    assert [sjlt.config(n) for n in (1, 2, 3, 100)] == [1, 2, 4, 4]


def test_sjlt_grids_stay_within_what_a_launch_allows() -> None:
    for entries in (1, 2**24, 2**27, 2**36):
        programs = -(-entries // (sjlt.ENTRIES * sjlt.steps_of(entries)))
        assert programs * 1024 < 2**31  # 4096 examples
    assert sjlt.steps_of(1) == 1
