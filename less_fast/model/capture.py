"""Capture: forward and backward with hooks that hand over each Linear's input and output gradient, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.model.inputs import Inputs
from less_fast.model.loss import example_losses, label_logits
from less_fast.model.quantized import differentiable
from less_fast.model.sites import Site

# Receives (site, input (n, T, D_in), output gradient (n, T, D_out)); n is N, or 1 in a packed batch (T is then the
# tokens of all examples) and for a module after the label gather.
Receiver = Callable[[Site, Tensor, Tensor], None]


@dataclass
class Pass:
    """A forward and a backward pass. ``called``: indices of the sites whose modules the forward pass has called."""

    called: set[int] = field(default_factory=set)
    backward: bool = False


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Within the context every module is in eval mode (dropout off) and no parameter requires a gradient.

    Autograd then computes no batch-summed weight gradient; both states are put back as they were.
    """
    modules = list(model.modules())  # once: a walk through a large model takes milliseconds
    training = [module for module in modules if module.training]
    # By name: offloading and sharding put other tensors in a parameter's place when its module is called.
    trainable = [
        (module, name)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for module in training:
        module.training = False
    for module, name in trainable:
        module.get_parameter(name).requires_grad_(False)
    try:
        with differentiable(modules):
            yield
    finally:
        for module in training:
            module.training = True
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(True)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within the context CUDA operations that have a deterministic form (attention's backward above all) use it."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it writes every new buffer, and nothing reads that
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filling


class _Saved(torch.autograd.Function):
    """Holds a tensor the way autograd holds what it saves, so that activation checkpointing can drop and remake it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def _saved(value: Tensor) -> Any:
    """A node of the graph whose ``saved_tensors`` are the value alone."""
    return _Saved.apply(torch.empty(0, requires_grad=True), value.detach()).grad_fn


@contextmanager
def hooked(sites: Sequence[Site], receive: Receiver, remade: bool) -> Iterator[Pass]:
    """Within the context each site's module calls ``receive`` in the backward pass of one forward pass.

    Yields the pass, to be told when its backward part begins: modules may then be called again, to compute anew what
    was not kept. The first captured output of the network is made to require a gradient, which is where backward will
    end: nothing below it is differentiated.
    """
    current = Pass()

    def forward_hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def on_forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if site.index in current.called and not current.backward:
                raise LessFastError(
                    f"the module of {site.name} is called more than once in a forward pass; "
                    "shared modules are not supported"
                )
            current.called.add(site.index)
            value: Tensor = args[0]
            if value.ndim != 3:
                raise LessFastError(
                    f"the module of {site.name} gets an input of shape {tuple(value.shape)}; expected (N, T, width)"
                )
            if not output.requires_grad:
                output.requires_grad_(True)
            # The hook lives as long as the whole graph: what it holds is let go when its turn has come.
            held: list[Any] = [_saved(value) if remade else value.detach()]

            def on_gradient(gradient: Tensor) -> None:
                kept = held.pop()
                receive(site, kept.saved_tensors[0] if remade else kept, gradient)

            output.register_hook(on_gradient)

        return on_forward

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_hook(forward_hook(site)).remove)
        yield current


def run(model: nn.Module, sites: Sequence[Site], inputs: Inputs, receive: Receiver, *, remade: bool = False) -> Tensor:
    """One forward and backward pass of the sum of the examples' losses; returns the losses, float32 (N,).

    ``remade``: activation checkpointing drops what layers keep and computes it anew, the captured inputs too.
    """
    with (
        torch.enable_grad(),
        deterministic(inputs.input_ids.device),
        frozen_eval(model),
        hooked(sites, receive, remade) as current,
    ):
        losses = example_losses(
            label_logits(model, inputs.input_ids, inputs.labels, inputs.position_ids), inputs.labels
        )
        for site in sites:
            if site.index not in current.called:
                raise LessFastError(
                    f"the module of {site.name} was not called in the forward pass: its adapter is disabled or merged, "
                    "or its weight is used in another way; leave it out"
                )
        current.backward = True
        losses.sum().backward()
    return losses.detach()
