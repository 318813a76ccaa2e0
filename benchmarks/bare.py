"""The baseline of extraction: the least that any per-example gradient of the adapters needs of the model.

The same model and batches as extraction, LoRA weights frozen, logits at label positions only, backward down to the
first adapter's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.model.capture import frozen_eval
from less_fast.model.inputs import Inputs, checked
from less_fast.model.loss import example_losses, label_logits
from less_fast.model.packed import Layout, attending

PADDED = Layout(packed=False, own_attention=False)


@contextmanager
def graph_from_first_adapter(model: nn.Module) -> Iterator[None]:
    """Autograd starts at the first LoRA output of the network, as in extraction."""

    def start(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    first = [module for name, module in model.named_modules() if ".layers.0." in name and ".lora_A." in name]
    handles = [module.register_forward_hook(start) for module in first]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare(model: nn.Module, batch: Mapping[str, Tensor], layout: Layout = PADDED) -> Tensor:
    """Forward and backward of the frozen model over a batch on the host, laid out as given; returns the losses."""
    inputs = Inputs.of(checked(batch, None), next(model.parameters()).device, packed=layout.packed)
    attention: Any = attending(model, inputs.tokens) if layout.own_attention else nullcontext()
    with torch.enable_grad(), frozen_eval(model), graph_from_first_adapter(model), attention:
        logits = label_logits(model, inputs.input_ids, inputs.labels, inputs.position_ids)
        losses = example_losses(logits, inputs.labels)
        del logits
        losses.sum().backward()
    return losses.detach()
