"""Operands of the fused kernels for one matrix, their launch through a runner, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from less_fast.layout import Parameter, ParameterLayout
from less_fast.ops.accumulate import accumulate
from less_fast.ops.outer_sketch import sum_lanes
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection
from support.triton_run import Run, kernels

LENGTHS = (3, 0, 70, 1, 33)
RULES = ("none", "sign", "less", "torch")
SEED = 2**40 + 3


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
    nnz: int = 0  # of the SJLT; 0: the blocked SRHT
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
        kind = {"nnz": self.nnz} if self.nnz else {"block": self.block}
        self.projection = Projection("sjlt" if self.nnz else "srht", self.dim, seed=SEED, **kind)
        self.rule = NONE if self.rule_name == "none" else Rule(self.rule_name)
        if self.rule_name in ("less", "torch"):
            m = torch.randn(self.short, self.long, generator=generator)
            v = torch.rand(self.short, self.long, generator=generator)
            e = 0.0 if self.rule_name == "less" else 1e-3
            self.rule = Rule("adam", 0.9 * m, 0.999 * v + 1e-8, 0.1, 0.001, e)

    def starts(self) -> list[int]:
        return [sum(self.lengths[:n]) for n in range(len(self.lengths))]

    def lanes(self) -> Tensor:
        place = self.short, self.long, self.dim, self.block
        n_lanes = 1 if self.nnz else kernels("outer_sketch").plan(*place).lanes
        return torch.zeros(n_lanes, len(self.lengths), self.dim)

    def launch(self, run: Run, lanes: Tensor, tile: Any = None) -> Tensor:
        table = torch.tensor([self.starts(), self.lengths], dtype=torch.int32)
        operands = self.left, self.right, table[0], table[1]
        rule = self.rule.code, self.rule.a, self.rule.b, self.rule.alpha, self.rule.gamma, self.rule.e
        p = self.parameter
        if self.nnz:
            place = p.offset, p.short_stride, p.long_stride, self.nnz, SEED
            run("outer_sjlt.outer_sjlt", lanes[0], *operands, *place, *rule, None, tile)
        else:
            where = self.run_base, p.runs(self.block), self.block, SEED, torch.device("cpu")
            signs = run("outer_sketch.sign_table", *where)
            run("outer_sketch.outer_sketch", lanes, *operands, signs, self.run_base, self.block, *rule, tile)
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
