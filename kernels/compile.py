"""Compile kernels ahead of time, with no GPU, for an architecture that is named; read what the binary will occupy."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)  # A100, H100/H200, B200
FLOATS = ("alpha", "gamma", "e", "scale", "one")
# Multiples of 16 wherever the model's width is one; with the pointers, which always are, they let loads be vectors.
DIVISIBLE = (
    *("n_long", "n_entries", "dim", "width", "grads_stride", "out_stride", "chunk_stride", "features_stride"),
    *("right_stride", "lane_stride", "example_stride", "x_stride"),
    *("row_length", "row_stride", "part_stride", "query_stride"),
)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: its constants, argument types and warps, as a launcher would choose them.

    ``types`` gives the types of arguments in Triton's spelling where they are not float32 pointers (``*_ptr``),
    float32 (``FLOATS``) or int32 (all others). ``products``: it multiplies on tensor cores. ``vectors``: it reads 16
    bytes at a time. ``stages``: how many steps of its loop are under way at once. ``narrow``: its products have fewer
    than the 64 rows of an H100's warp-group instructions.
    """

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    products: bool = False
    vectors: bool = False
    narrow: bool = False

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
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> Resources:
    """What a compiled kernel occupies, from the cuobjdump that comes with Triton."""
    text = _inspect(triton.knobs.nvidia.cuobjdump.path, ["--dump-resource-usage"], compiled)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], compiled.metadata.shared)


def disassembly(compiled: Any) -> str:
    """A compiled kernel's machine code in text, from the nvdisasm that comes with Triton."""
    return _inspect(triton.knobs.nvidia.nvdisasm.path, [], compiled)


def _inspect(tool: str, options: list[str], compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout
