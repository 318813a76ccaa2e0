"""Causal attention within the examples of a flat token axis: a variable-length kernel, or one example at a time."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from less_fast.segments import Segments

# The kernels of torch and flash-attn are both FlashAttention-2: heads of at most 256 values, in steps of 8, sm_80 on.
_MAX_HEAD_DIM = 256
_HEAD_STEP = 8
_CAPABILITY = (8, 0)

# Whether the layer that attends keeps nothing for the backward pass (checkpointed.py).
in_checkpoint: ContextVar[bool] = ContextVar("less_fast_in_checkpoint", default=False)


@dataclass(frozen=True)
class VarlenKernel:
    """``attend(query, key, value, boundaries, longest, window, scale)``: (tokens, H, D) and twice (tokens, H', D) in.

    ``boundaries``: (examples + 1,) int32, where each example starts, then their end. ``window``: tokens that a token
    sees, itself included, or None for all. ``windows``: whether it can do other than None.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int | None, float], Tensor]
    windows: bool


@cache
def varlen_kernel() -> VarlenKernel | None:
    """flash-attn's where it is installed, else torch's where this version has one."""
    try:
        return flash_attn_kernel(importlib.import_module("flash_attn").flash_attn_varlen_func)
    except (ImportError, AttributeError):  # absent, or built for another torch
        pass
    try:
        return torch_kernel(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    except (ImportError, AttributeError):
        return None


def flash_attn_kernel(function: Callable[..., Any]) -> VarlenKernel:
    """Of flash-attn's ``flash_attn_varlen_func``."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int | None, scale: float
    ) -> Tensor:
        places = (boundaries, boundaries, longest, longest)
        left = -1 if window is None else window - 1
        options = {"softmax_scale": scale, "causal": True, "window_size": (left, 0), "deterministic": True}
        out: Tensor = function(query, key, value, *places, **options)
        return out

    return VarlenKernel("flash_attn_varlen_func", attend, windows=True)


def torch_kernel(function: Callable[..., Any]) -> VarlenKernel:
    """Of ``torch.nn.attention.varlen.varlen_attn``, whose keywords differ from one torch to the next."""
    known = inspect.signature(function).parameters

    def attend(
        query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int | None, scale: float
    ) -> Tensor:
        options: dict[str, Any] = {}
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if "scale" in known:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out: Tensor = _Deterministic.apply(
            lambda q, k, v: function(q, k, v, boundaries, boundaries, longest, longest, **options), query, key, value
        )
        return out

    return VarlenKernel("varlen_attn", attend, windows="window_size" in known)


def refuses(kernel: VarlenKernel, query: Tensor, value: Tensor, window: int | None) -> str | None:
    """None where a kernel can take (1, H, tokens, D) operands, else the reason why not."""
    if not query.is_cuda:
        return f"the tensors are on {query.device}, and {kernel.name} runs on CUDA devices"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {query.dtype}; {kernel.name} takes float16 and bfloat16"
    width = query.shape[-1]
    if width != value.shape[-1] or width > _MAX_HEAD_DIM or width % _HEAD_STEP:
        return f"heads have {width} values; {kernel.name} takes multiples of {_HEAD_STEP} up to {_MAX_HEAD_DIM}"
    if window is not None and not kernel.windows:
        return f"{kernel.name} of torch {torch.__version__} has no sliding windows"
    if torch.cuda.get_device_capability(query.device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(query.device)} is older than sm_80, which {kernel.name} needs"
    return None


def attend_each(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scale: float
) -> Tensor:
    """(rows, H, T, D) -> (rows, T, H, D): one call an example of a packed batch, one for all rows of a padded one."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if segments.row_length is not None:
            return _causal(query, key, value, window, scale)
        parts = []
        for start, length in zip(segments.starts, segments.lengths):
            q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
            parts.append(_causal(q, k, v, window, scale))
        return torch.cat(parts, 2)

    out: Tensor = _Deterministic.apply(attend, query, key, value) if query.is_cuda else attend(query, key, value)
    return out.transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    length = query.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    at = torch.arange(length, device=query.device)
    distance = at[:, None] - at
    return scaled_dot_product_attention(query, key, value, (distance >= 0) & (distance < window), **options)


class _Deterministic(torch.autograd.Function):
    """Attention whose backward pass runs in torch's strict deterministic mode.

    The fused kernels add up some gradients in the order in which their programs finish unless that mode is strict;
    where it only warns, as around the rest of the pass, torch takes the fast way. Strict mode raises where torch has no
    deterministic form (it takes a plain cuBLAS product for such), and then the fast way it is.
    """

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.attend, ctx.graph = attend, None
        if in_checkpoint.get():
            ctx.save_for_backward(query, key, value)
            return attend(query, key, value)
        ctx.graph = _graph(attend, (query, key, value), ctx.needs_input_grad[1:])
        out: Tensor = ctx.graph[1].detach()
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operands, out = ctx.graph or _graph(ctx.attend, ctx.saved_tensors, ctx.needs_input_grad[1:])
        ctx.graph = None  # so that what the kernel saved is let go layer by layer
        wanted = [x for x in operands if x.requires_grad]
        try:
            with strictly_deterministic():
                found = iter(torch.autograd.grad(out, wanted, gradients, retain_graph=True))
        except RuntimeError as error:
            if "eterministic" not in str(error):
                raise
            found = iter(torch.autograd.grad(out, wanted, gradients))
        return None, *(next(found) if x.requires_grad else None for x in operands)


def _graph(
    attend: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(needed) for x, needed in zip(operands, wanted)]
        return leaves, attend(*leaves)


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    """Within the context torch raises rather than run an operation that is not deterministic."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
