"""How many padded tokens a batch may have: derived from the device, and what running out of memory looks like."""

from __future__ import annotations

import torch
from torch import nn

# On a CPU larger batches bring no speed once the matrix products are large (benchmarks/overhead.py).
_CPU_TOKENS = 4096
_MOST_TOKENS = 1 << 16
# Share of the device that activations may take; the rest is for the allocator's gaps and the sketch's buffers.
_SHARE = 0.5


def auto_token_budget(model: nn.Module, device: torch.device, max_length: int) -> int:
    """Padded tokens per batch, a power of two from 256 to 65,536, the same for equal devices and models.

    CUDA: the activations that a backward pass keeps, about 16·width + 4·intermediate values a token and layer, and
    the logits, fill half of what the weights leave of the device's total memory.
    """
    if device.type != "cuda":
        return max(_CPU_TOKENS, max_length)
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    width = getattr(text_config, "hidden_size", 4096)
    layers = getattr(text_config, "num_hidden_layers", 32)
    inner = getattr(text_config, "intermediate_size", 4 * width)
    vocabulary = getattr(text_config, "vocab_size", 32000)
    parameter = next(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    free = torch.cuda.get_device_properties(device).total_memory - weights
    per_token = layers * (16 * width + 4 * inner) * parameter.element_size() + 8 * vocabulary
    tokens = max(256, min(_MOST_TOKENS, int(_SHARE * free / per_token)))
    return 1 << (tokens.bit_length() - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, cuBLAS or Python ran out of device or host memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(sign in text for sign in ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED"))
