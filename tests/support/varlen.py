"""Stand-ins for the variable-length attention kernels, with the keywords of each version, that do what it documents."""

from __future__ import annotations

import torch
from torch import Tensor

from less_fast.model.varlen import flash_attn_kernel, torch_kernel


def dense(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, causal: bool, window: tuple[int, int], scale: float) -> Tensor:
    """The definition in float64: softmax over the keys of the same example in [i - left, i + right]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    at = torch.arange(q.shape[0])
    example = torch.bucketize(at, cu.long()[1:], right=True)
    gap = at[:, None] - at
    seen = example[:, None] == example
    left, right = window[0], 0 if causal else window[1]
    seen &= (gap <= left) if left >= 0 else True
    seen &= (gap >= -right) if right >= 0 else True
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.double()).to(q.dtype)


def same_heads(q: Tensor, k: Tensor) -> None:
    if q.shape[1] != k.shape[1]:
        raise ValueError("expected as many key heads as query heads")


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore
    same_heads(query, key)
    return dense(query, key, value, cu_seq_q, is_causal, (-1, -1), query.shape[-1] ** -0.5)


def varlen_2_11(  # type: ignore
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    same_heads(query, key)
    return dense(query, key, value, cu_seq_q, False, window_size, scale or query.shape[-1] ** -0.5)


def varlen_2_13(  # type: ignore
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    if not enable_gqa:
        same_heads(query, key)
    return dense(query, key, value, cu_seq_q, False, window_size, scale or query.shape[-1] ** -0.5)


def flash_attn_2(  # type: ignore
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
):  # fmt: skip
    assert deterministic and not dropout_p
    return dense(q, k, v, cu_seqlens_q, causal, window_size, softmax_scale or q.shape[-1] ** -0.5)


KERNELS = [
    torch_kernel(varlen_2_10),
    torch_kernel(varlen_2_11),
    torch_kernel(varlen_2_13),
    flash_attn_kernel(flash_attn_2),
]
