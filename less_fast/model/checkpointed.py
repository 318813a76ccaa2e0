"""Activation checkpointing: a decoder layer keeps its input alone and runs once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from less_fast.errors import LessFastError
from less_fast.model.varlen import in_checkpoint


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers says can run twice; LessFastError where there are none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise LessFastError(
            f"{type(model).__name__} has no layer that transformers can checkpoint (GradientCheckpointingLayer); "
            "use checkpoint_activations=False"
        )
    return layers


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context what these layers save for the backward pass is dropped and computed again there.

    transformers' own switch works in training mode only, which would turn dropout on.
    """
    before = [vars(layer).get("forward") for layer in layers]  # accelerate puts one there
    for layer in layers:
        vars(layer)["forward"] = _twice(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def _twice(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward
    # torch ends the second pass at the last tensor that is missing; accelerate would then not put the weights away.
    to_the_end = any(hasattr(module, "_hf_hook") for module in layer.modules())

    def run(*args: Any, **kwargs: Any) -> Any:
        # A GPU's backward pass has threads of its own, which do not know what this one has set.
        context = copy_context()
        context.run(in_checkpoint.set, True)
        with set_checkpoint_early_stop(not to_the_end):
            return checkpoint(context.run, forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
