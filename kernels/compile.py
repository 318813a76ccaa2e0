"""Compile kernels ahead of time, with no GPU, for an architecture that is named; read what the binary will occupy."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from less_fast.kernels import accumulate, philox, sjlt
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from less_fast.projection import TAG_SRHT_IN

CAPABILITIES = (80, 90, 100)  # A100, H100/H200, B200
FLOATS = ("alpha", "gamma", "e", "scale")
# Multiples of 16 wherever the model's width is one; with the pointers, which always are, they let loads be vectors.
DIVISIBLE = ("n_long", "n_entries", "grads_stride", "out_stride", "chunk_stride", "features_stride", "dim")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: its constants, argument types and warps, as a launcher would choose them.

    ``types`` gives the types of arguments in Triton's spelling where they are not float32 pointers (``*_ptr``),
    float32 (``FLOATS``) or int32 (all others).
    """

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    warps: int = 4

    def type_of(self, argument: str) -> str:
        if argument in self.constants:
            return "constexpr"
        default = "*fp32" if argument.endswith("_ptr") else "fp32" if argument in FLOATS else "i32"
        return self.types.get(argument, default)


@dataclass(frozen=True)
class Resources:
    """What one thread (registers, stack, local: bytes) and one program (shared: bytes) of a binary occupy."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel for one architecture (80, 90, 100, …); ``.asm`` holds its "ptx" and "cubin"."""
    signature = {name: variant.type_of(name) for name in variant.kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if name.endswith("_ptr") or (name in DIVISIBLE and name not in variant.constants)
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    options = {"num_warps": variant.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> Resources:
    """What a compiled kernel occupies, from the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], compiled.metadata.shared)


def variants() -> list[Variant]:
    """Every kernel as it is launched for 32 examples of a 16 x 4096 matrix and K = 8192 with an Adam rule."""
    n, short, long, dim = 32, 16, 4096, 8192

    def srht(block: int) -> Variant:
        tile = accumulate.config("srht", n, short, long, dim, block)
        constants = {"MODE": accumulate.MODE_ADAM, "ADD": tile.chunks == 1, "EXAMPLES": tile.examples}
        constants |= {"SLOTS": tile.width, "LOG_BLOCK": block.bit_length() - 1}
        return Variant(f"srht_{block}", accumulate.srht_kernel, constants, warps=tile.warps)

    def dense(kind: str) -> Variant:
        tile = accumulate.config("dense", n, short, long, dim)
        constants = {"MODE": accumulate.MODE_ADAM, "ADD": tile.chunks == 1, "EXAMPLES": tile.examples}
        constants |= {"GAUSSIAN": kind == "gaussian", "ENTRIES": accumulate.DENSE_ENTRIES, "COLS": tile.width}
        return Variant(kind, accumulate.dense_kernel, constants, warps=tile.warps)

    def columns(kind: str, pointer: str) -> Variant:
        constants = {"GAUSSIAN": kind == "gaussian", "BLOCK_N": philox.COLUMNS_N, "BLOCK_K": philox.COLUMNS_K}
        return Variant(f"columns_{kind}", philox.columns_kernel, constants, {"out_ptr": pointer})

    entries = {"MODE": accumulate.MODE_ADAM, "EXAMPLES": sjlt.config(n), "ENTRIES": sjlt.ENTRIES}
    packed = {"TAG": TAG_SRHT_IN, "BLOCK_N": philox.SIGNS_N, "BLOCK_C": philox.SIGNS_C}
    tables = {"bucket_ptr": "*i32", "sign_ptr": "*u8"}
    integers = {"largest_ptr": "*i32", "sums_ptr": "*i64"}
    return [
        srht(64),
        srht(accumulate.MAX_BLOCK),
        dense("rademacher"),
        dense("gaussian"),
        Variant("sum", accumulate.sum_kernel, {"BLOCK": accumulate.SUM_BLOCK}),
        Variant("sjlt_largest", sjlt.sjlt_largest_kernel, entries, integers),
        Variant("sjlt_add", sjlt.sjlt_add_kernel, entries | {"NNZ": 1}, integers),
        Variant("sjlt_finish", sjlt.sjlt_finish_kernel, {"BLOCK": sjlt.FINISH_BLOCK}, integers),
        Variant("signs", philox.signs_kernel, packed, {"out_ptr": "*i32"}),
        Variant("sjlt_table", philox.sjlt_kernel, {"BLOCK_N": philox.SJLT_N}, tables),
        columns("rademacher", "*bf16"),
        columns("gaussian", "*fp32"),
    ]
