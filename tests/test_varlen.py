"""Attention kernels: the same meaning through every version's keywords, reasons, and deterministic backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.varlen import KERNELS, dense
from torch import Tensor

from less_fast.model.varlen import VarlenKernel, attend_each, refuses, torch_kernel
from less_fast.segments import Segments


@pytest.mark.parametrize(
    "kernel, window",
    [(kernel, window) for kernel in KERNELS for window in (None, 1, 4) if kernel.windows or not window],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_kernels_keywords_mean_the_same(kernel: VarlenKernel, window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    lengths, scale = (5, 1, 9), 0.3
    segments = Segments.packed(lengths, torch.device("cpu"))
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    boundaries = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    expected = dense(q, k, v, boundaries, True, (-1 if window is None else window - 1, 0), scale)
    toward = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), toward)
    by_kernel = kernel.attend(q, k, v, boundaries, 9, window, scale)
    by_example = attend_each(*(x.transpose(0, 1)[None] for x in (q, k, v)), segments, window, scale)[0]
    for out in (by_kernel, by_example):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), toward), wanted)


def test_a_kernel_says_why_it_cannot_run() -> None:
    old, new = KERNELS[0], KERNELS[2]
    assert "runs on CUDA devices" in (refuses(new, torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), None) or "")

    def reason(kernel: VarlenKernel, dtype: torch.dtype, width: int, window: int | None = None) -> str | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            operand = torch.ones(1, 2, 3, width, dtype=dtype)
            return refuses(kernel, operand, operand, window)

    assert reason(new, torch.bfloat16, 64, window=4) is None and reason(new, torch.float16, 256) is None
    for found, word in (
        (reason(new, torch.float32, 64), "float16 and bfloat16"),
        (reason(new, torch.bfloat16, 264), "up to 256"),
        (reason(new, torch.bfloat16, 60), "multiples of 8"),
        (reason(old, torch.bfloat16, 64, window=4), "no sliding windows"),
    ):
        assert word in (found or "")


class Watched(torch.autograd.Function):
    """The identity; notes the determinism mode that its backward pass runs in."""

    modes: list[tuple[bool, bool]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        Watched.modes.append(mode)
        return gradients[0]


def test_the_kernels_backward_pass_is_strictly_deterministic() -> None:
    kernel = torch_kernel(lambda q, k, v, *places, window_size, scale: Watched.apply(q + k + v))
    q, k, v = (torch.randn(3, 1, 8, requires_grad=True) for _ in range(3))
    Watched.modes.clear()
    boundaries = torch.tensor([0, 3], dtype=torch.int32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        kernel.attend(Watched.apply(q), k, v.detach(), boundaries, 3, None, 1.0).sum().backward()
        assert Watched.modes == [(True, False), (True, True)]  # in the kernel, then outside of it
    finally:
        torch.use_deterministic_algorithms(False)
    assert q.grad is not None and k.grad is not None and v.grad is None


class OnlyFast(torch.autograd.Function):
    """The identity, with a backward pass that has no deterministic form, or fails in another way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if not torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(ctx.message)
        return 2 * gradients[0], None


def test_what_has_no_deterministic_form_takes_the_usual_one() -> None:
    x = torch.ones(3, 1, 8, requires_grad=True)
    boundaries = torch.tensor([0, 3], dtype=torch.int32)
    for message in ("bmm does not have a deterministic implementation", "illegal memory access"):
        kernel = torch_kernel(lambda q, k, v, *places, window_size, scale, m=message: OnlyFast.apply(q, m))
        out = kernel.attend(x, x.detach(), x.detach(), boundaries, 3, None, 1.0)
        if "deterministic" in message:
            assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 2.0))
        else:
            with pytest.raises(RuntimeError, match="illegal"):
                torch.autograd.grad(out.sum(), x)
        assert not torch.are_deterministic_algorithms_enabled()
