"""Where a model computes: its weights may lie on several devices, or be fetched for each call by accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.model.sites import Site


def main_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs and gives its logits; its weights may be on the meta device when not in use."""
    for module in model.modules():
        place = execution_device(module)
        if place is not None:
            return place
    return next(model.parameters()).device


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook makes a module compute; None where the module has no such hook."""
    hook: Any = getattr(module, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return None if place is None else torch.device(place)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2's ``fully_shard`` was called on, outermost first."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` has spread the weights over ranks, which then compute in step."""
    return bool(sharded_modules(model))


def sharded_bytes(model: nn.Module) -> int:
    """What a rank of a sharded model holds of its weights at most: its shards, and what is gathered at the same time.

    Gathered are the outermost module's own weights for the whole of a pass, and those of two others: the one that
    computes and the next.
    """
    modules = sharded_modules(model)
    owners: dict[nn.Parameter, int] = {}  # the innermost module that holds it, by number
    for number, module in enumerate(modules):
        module.reshard()  # a forward pass alone leaves weights gathered
        owners.update(dict.fromkeys(module.parameters(), number))
    gathered, shards = [0] * len(modules), 0
    for parameter in model.parameters():
        shard: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        shards += shard.numel() * shard.element_size()
        if parameter in owners:
            gathered[owners[parameter]] += parameter.numel() * parameter.element_size()
    return shards + gathered[0] + sum(sorted(gathered[1:])[-2:])


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what the ranks that hold its parts gather of it, in step."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def fetched(model: nn.Module, name: str) -> Tensor:
    """A weight or buffer by name, on the host where it is offloaded."""
    from accelerate.utils import align_module_device

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module, torch.device("cpu")):
        tensor: Tensor = getattr(module, leaf)
        return tensor.detach()


@contextmanager
def recorded_devices(sites: Sequence[Site], default: torch.device) -> Iterator[list[torch.device]]:
    """Within the context forward passes fill the list that is yielded: where each site's module gets its input."""
    found = [default] * len(sites)

    def recorder(index: int) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found[index] = output.device

        return on_forward

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_hook(recorder(site.index)).remove)
        yield found
