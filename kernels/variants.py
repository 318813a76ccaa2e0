"""Which kernels are compiled ahead of time, as launchers would choose them: what tests hold against a budget."""

from __future__ import annotations

from typing import Any

import torch
from less_fast.kernels import accumulate, dense, inner_products, outer_sjlt, outer_sketch, philox, sjlt, srht
from less_fast.kernels.compile import Variant
from less_fast.kernels.mix import TF32_BITS
from less_fast.kernels.rule import MODE_ADAM, MODE_NONE, mode_of

from less_fast.projection import TAG_SRHT_IN

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIM, FLAT, SHORT, LONG = 8192, 2**27, 16, 4096
_WIDE = dict.fromkeys(("n_long", "n_entries", "grads_stride"), "i64")  # as where P is 2^31 or more
_SEGMENTS = dict.fromkeys(("starts_ptr", "lengths_ptr", "signs_ptr", "bound_ptr", "bad_ptr", "largest_ptr"), "*i32")
_INTEGERS = {"largest_ptr": "*i32", "sums_ptr": "*i64"}


def variants(capability: int) -> list[Variant]:
    """Every kernel, for an architecture (80, 90, 100, …); their names do not depend on it."""
    return fused_variants(capability) + flat_variants(capability) + table_variants() + score_variants(capability)


def fused_variants(capability: int) -> list[Variant]:
    """Kernels from activations to features, with Adam: ranks of one narrow, one half and one whole tile."""
    ranks = [(16, "bf16"), (16, "fp16"), (16, "fp32"), (64, "bf16"), (128, "bf16"), (128, "fp16"), (128, "fp32")]
    sums = [(16, "bf16"), (16, "fp32"), (128, "bf16"), (128, "fp16"), (128, "fp32")]
    largest = {"TOKENS": outer_sjlt.LARGEST_TOKENS, "WIDTH": outer_sjlt.LARGEST_WIDTH}
    types = {"x_ptr": "*bf16"} | _SEGMENTS
    return [
        *(_outer_sketch(rank, dtype, capability) for rank, dtype in ranks),
        *(_outer_sjlt(rank, dtype) for rank, dtype in sums),
        Variant("segment_largest", outer_sjlt.segment_largest_kernel, largest, types, vectors=True),
    ]


def flat_variants(capability: int) -> list[Variant]:
    """Kernels that read gradients in device memory, K = 8192: P = 2^27 with no rule, or 16 x 4096 matrices with Adam.

    Every kernel in every input dtype; float16 and bfloat16 differ in a conversion only, so that one of them is enough
    for what does not depend on the dtype: the longest and the shortest runs, and Adam.
    """
    raw = [("bf16", MODE_NONE), ("fp16", MODE_NONE), ("fp32", MODE_NONE)]
    adam = ("fp32", MODE_ADAM)
    return [
        *(_srht(64, *case, capability) for case in [*raw, adam]),
        _srht(srht.MIN_PRODUCT, "bf16", MODE_NONE, capability),
        _srht(srht.MAX_PRODUCT, "fp32", MODE_NONE, capability),
        _srht(srht.MAX_BLOCK, *adam, capability),
        *(_dense("rademacher", *case, capability) for case in [*raw, adam]),
        *(_dense("gaussian", *case, capability) for case in [*raw[:2], adam]),
        *(_sjlt_largest(*case) for case in [*raw[:2], adam]),
        *(_sjlt_add(*case) for case in [*raw[:2], adam]),
        Variant("sum", accumulate.sum_kernel, {"BLOCK": accumulate.SUM_BLOCK}),
        Variant("sjlt_finish", sjlt.sjlt_finish_kernel, {"BLOCK": sjlt.FINISH_BLOCK}, _INTEGERS),
    ]


def table_variants() -> list[Variant]:
    """Kernels that write random tables."""

    def columns(kind: str, pointer: str) -> Variant:
        constants = {"GAUSSIAN": kind == "gaussian", "BLOCK_N": philox.COLUMNS_N, "BLOCK_K": philox.COLUMNS_K}
        return Variant(f"columns_{kind}", philox.columns_kernel, constants, {"out_ptr": pointer})

    packed = {"TAG": TAG_SRHT_IN, "BLOCK_N": philox.SIGNS_N, "BLOCK_C": philox.SIGNS_C}
    tables = {"bucket_ptr": "*i32", "sign_ptr": "*u8"}
    return [
        Variant("signs", philox.signs_kernel, packed, {"out_ptr": "*i32"}),
        Variant("sjlt_table", philox.sjlt_kernel, {"BLOCK_N": philox.SJLT_N}, tables),
        columns("rademacher", "*bf16"),
        columns("gaussian", "*fp32"),
    ]


def score_variants(capability: int) -> list[Variant]:
    """Products of stored codes with queries, in both tiles of a dtype (once for bfloat16, which is as float16)."""

    def products(queries: int, name: str, pointer: str, codes: torch.dtype, parts: str = "bf16") -> Variant:
        tile = inner_products.config(queries, codes, torch.int8 if parts == "i8" else DTYPES[parts], capability)
        constants = inner_products.constants(tile, accumulate=True)
        types = {"codes_ptr": pointer, "parts_ptr": f"*{parts}", "query_sum_ptr": "*i32"}
        return Variant(
            f"inner_products_{queries}_{name}", inner_products.inner_products_kernel, constants, types,
            tile.warps, tile.stages, products=True, vectors=tile.planes == 1,
        )  # fmt: skip

    most = inner_products.MOST_QUERIES
    return [
        variant
        for queries in (inner_products.FEW_QUERIES, most)
        for variant in (
            products(queries, "fp32", "*fp32", torch.float32),
            products(queries, "fp16", "*fp16", torch.float16, "fp16"),
            products(queries, "int8", "*i8", torch.int8),
            products(queries, "bits", "*u8", torch.uint8),
            products(queries, "bits_bits", "*u8", torch.uint8, "i8"),
        )
    ] + [products(most, "bf16", "*bf16", torch.bfloat16)]


def _name(kernel: str, dtype: str, mode: int) -> str:
    return f"{kernel}_{dtype}" + ("_adam" if mode == MODE_ADAM else "")


def _types(dtype: str, mode: int) -> dict[str, str]:
    return {"grads_ptr": f"*{dtype}"} | ({} if mode == MODE_ADAM else _WIDE)


def _srht(block: int, dtype: str, mode: int, capability: int) -> Variant:
    n, short, long = (32, SHORT, LONG) if mode == MODE_ADAM else (16, 1, FLAT)
    tile = srht.config(n, short, long, DIM, block, mode, DTYPES[dtype], capability)
    constants: dict[str, Any] = {"MODE": mode_of(mode, 0.0), "MIXING": tile.mixing, "BITS": TF32_BITS}
    constants |= {"ADD": tile.chunks == 1, "EXAMPLES": tile.examples, "SLOTS": tile.slots}
    constants |= {"LOG_BLOCK": block.bit_length() - 1} | ({"n_short": 1} if short == 1 else {})
    products = tile.mixing != srht.BUTTERFLIES
    return Variant(
        _name(f"srht_{block}", dtype, mode), srht.srht_kernel, constants, _types(dtype, mode),
        tile.warps, tile.stages, products, vectors=True,
    )  # fmt: skip


def _dense(kind: str, dtype: str, mode: int, capability: int) -> Variant:
    n, size = (128, SHORT * LONG) if mode == MODE_ADAM else (16, FLAT)
    tile = dense.config(n, size, kind, mode, DTYPES[dtype], capability)
    constants: dict[str, Any] = {"MODE": mode_of(mode, 0.0), "EXACT": tile.exact, "BITS": TF32_BITS}
    constants |= {"ADD": tile.chunks == 1, "FLAT": mode == MODE_NONE}
    constants |= {"EXAMPLES": tile.examples, "ENTRIES": tile.entries}
    kernel = dense.gaussian_kernel if kind == "gaussian" else dense.rademacher_kernel
    types = _types(dtype, mode)
    name = _name(kind, dtype, mode)
    vectors = tile.examples * tile.entries * DTYPES[dtype].itemsize >= 16 * 32 * tile.warps
    return Variant(name, kernel, constants, types, tile.warps, tile.stages, products=True, vectors=vectors)


def _sjlt_largest(dtype: str, mode: int) -> Variant:
    constants = {"MODE": mode_of(mode, 0.0), "ENTRIES": sjlt.LARGEST_ENTRIES, "STEPS": sjlt.LARGEST_STEPS}
    types = _types(dtype, mode) | _INTEGERS
    name = _name("sjlt_largest", dtype, mode)
    return Variant(name, sjlt.sjlt_largest_kernel, constants, types, sjlt.LARGEST_WARPS, vectors=True)


def _sjlt_add(dtype: str, mode: int) -> Variant:
    constants = {"NNZ": 1, "MODE": mode_of(mode, 0.0), "FLAT": mode == MODE_NONE, "BOUND": 0}
    constants |= {"EXAMPLES": sjlt.config(16), "ENTRIES": sjlt.ENTRIES}
    types = _types(dtype, mode) | _INTEGERS
    return Variant(_name("sjlt_add", dtype, mode), sjlt.sjlt_add_kernel, constants, types, vectors=True)


def _outer_sketch(rank: int, dtype: str, capability: int) -> Variant:
    tile = outer_sketch.config(rank, DTYPES[dtype], capability)
    constants = outer_sketch.constants(rank, DTYPES[dtype], 64, mode_of(MODE_ADAM, 0.0), tile)
    types = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}"} | _SEGMENTS
    return Variant(
        f"outer_sketch_{rank}_{dtype}", outer_sketch.outer_sketch_kernel, constants, types, tile.warps, tile.stages,
        products=True, vectors=True, narrow=tile.rows < 64,
    )  # fmt: skip


def _outer_sjlt(rank: int, dtype: str) -> Variant:
    tile = outer_sjlt.config(rank, DTYPES[dtype])
    constants = outer_sjlt.constants(rank, DTYPES[dtype], 1, mode_of(MODE_ADAM, 0.0), tile)
    types = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}"} | _SEGMENTS | _INTEGERS
    return Variant(
        f"outer_sjlt_{rank}_{dtype}", outer_sjlt.outer_sjlt_kernel, constants, types, tile.warps, tile.stages,
        products=True, vectors=True, narrow=True,
    )  # fmt: skip
