"""How many tokens a batch may have: derived from the device, and what running out of memory looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from less_fast.model.devices import is_sharded, sharded_bytes
from less_fast.model.sites import Site

# On a CPU larger batches bring no speed once the matrix products are large (benchmarks/overhead.py).
_CPU_TOKENS = 4096
_MOST_TOKENS = 1 << 16
# Share of what the weights leave that a batch may take; the rest is for gradients on their way back, the allocator's
# gaps and the sketch's buffers.
_SHARE = 0.6
# Bytes of a label token and vocabulary entry: logits and their gradient in the model's dtype (at most 4 bytes each, 2
# where it matters most), in float32 the logits, their log-softmax and its gradient.
_LOGIT_BYTES = 16


def auto_token_budget(
    model: nn.Module, sites: Sequence[Site], device: torch.device, max_length: int, *, checkpointed: bool = False
) -> int:
    """Tokens per batch, padding included, the same for equal devices and models.

    CUDA: what a token keeps until the backward pass (:func:`bytes_per_token`) fills 0.6 of what weights and Adam's two
    tables leave of the device's total memory; 256 to 65,536, in steps of 1,024 where that many fit. ``sites``: the
    captured modules. ``checkpointed``: whether layers keep their inputs alone.
    """
    if device.type != "cuda":
        return max(_CPU_TOKENS, max_length)
    if is_sharded(model):
        weights = sharded_bytes(model)
    else:
        # Layers on other devices, and weights that are fetched for each call, leave this one's memory alone.
        here = [p for p in model.parameters() if not p.is_meta and p.get_device() in (-1, device.index or 0)]
        weights = sum(p.numel() * p.element_size() for p in here)
    tables = sum(8 * site.module.get_parameter("weight").numel() for site in sites)
    free = torch.cuda.get_device_properties(device).total_memory - weights - tables
    tokens = max(256, min(_MOST_TOKENS, int(_SHARE * free / bytes_per_token(model, sites, checkpointed))))
    return tokens if tokens < 1024 else tokens // 1024 * 1024


def bytes_per_token(model: nn.Module, sites: Sequence[Site], checkpointed: bool = False) -> int:
    """What the forward pass of a frozen decoder keeps for the backward pass, and its logits, a token (that is a label).

    A layer keeps, in the model's dtype, the queries, keys, values and outputs of its attention (4 widths at most), the
    gate, its activation and the other factor of its MLP (3 inner widths), and in float32 the input of two norms. The
    captured modules' inputs come on top (:func:`captured_bytes`). ``checkpointed``: all that is kept of one layer at a
    time, and the input of each.
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    width = getattr(config, "hidden_size", 4096)
    layers = getattr(config, "num_hidden_layers", 32)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    item = next(model.parameters()).element_size()
    a_layer = item * (4 * width + 3 * inner) + 2 * 4 * width
    kept = layers * a_layer + captured_bytes(sites, item)
    if checkpointed:
        kept = layers * item * width + kept // layers
    return kept + _LOGIT_BYTES * getattr(config, "vocab_size", 32000)


def captured_bytes(sites: Sequence[Site], item: int) -> int:
    """Bytes of the captured modules' inputs a token; ``item``: bytes of a value of the model's activations.

    Adapters of the model's own dtype on neighbours (queries, keys, values) are fed the same tensor, and it is held
    once. PEFT casts the input for each adapter of another dtype, float32 ones on a bfloat16 model above all.
    """
    held: dict[tuple[str, int], int] = {}
    for site in sites:
        weight = site.module.get_parameter("weight")
        width = max(weight.shape) if site.short_is_output else min(weight.shape)
        adapted, _, matrix = site.name.partition(".lora_")
        shared = weight.element_size() == item and not matrix.startswith("B")
        block = adapted.removesuffix(".weight").rpartition(".")[0]
        held[block if shared else site.name, width] = width * weight.element_size()
    return sum(held.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, cuBLAS, Triton, the CUDA driver or Python ran out of device or host memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
    return any(sign in text for sign in signs)
