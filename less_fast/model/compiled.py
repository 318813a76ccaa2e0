"""Regional compilation: ``torch.compile`` of the parts of a model that hold no captured module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from less_fast.model.sites import Site

# One operation each: nothing to fuse.
_PLAIN = (nn.Linear, nn.Embedding, Conv1D)


def compilable(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The largest parts of the decoder layers that hold neither a captured module nor attention: MLPs and norms.

    Attention stays as it is: it goes by what the current batch looks like, which is no argument of the module.
    """
    captured = {id(site.module) for site in sites}

    def open_up(module: nn.Module) -> bool:
        return any(id(part) in captured or "Attention" in type(part).__name__ for part in module.modules())

    def parts(module: nn.Module) -> Iterator[nn.Module]:
        if open_up(module):
            for child in module.children():
                yield from parts(child)
        elif not isinstance(module, _PLAIN) and any(True for _ in module.parameters()):
            yield module

    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    found = {id(part): part for layer in layers if open_up(layer) for part in parts(layer)}
    return list(found.values())


@contextmanager
def compiled(model: nn.Module, sites: Sequence[Site], *, backend: str = "inductor") -> Iterator[None]:
    """Within the context the :func:`compilable` parts run compiled, for batches of any size; then they are as before.

    Parts that are compiled already stay so. ``backend``: of ``torch.compile``.
    """
    changed = [part for part in compilable(model, sites) if part._compiled_call_impl is None]
    try:
        for part in changed:
            part.compile(dynamic=True, backend=backend)
        yield
    finally:
        for part in changed:
            part._compiled_call_impl = None
