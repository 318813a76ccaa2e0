"""``Syncs``: on a machine without a GPU, notes what would make the host wait for one."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import less_fast.features
import less_fast.transfer

# Operations whose result, or its shape, the host has to know before it goes on.
_READS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique",
    "repeat_interleave.Tensor",
)
# These as well where an index is a mask.
_INDEXED = ("index.Tensor", "index_put", "_index_put_impl_")
_METHODS = ("tolist", "numpy", "cpu", "item")


class Syncs:
    """Within the context: what ``to_device`` returns is on the device, and so is all that is computed from it.

    Model weights are marked by :meth:`mark`. ``found``: what reads from the device, by name. ``sent``: tensors sent.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        self.sent = 0
        self.running = False
        # A weak reference also keeps the address from being given to another storage.
        self._storages: dict[int, StorageWeakRef] = {}
        self._patch = monkeypatch
        self._stack = ExitStack()

    def mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)

    def on_device(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages

    def send(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        sent = tensor.clone()
        self.sent += 1
        self.mark(sent)
        return sent

    def __enter__(self) -> Syncs:
        inner = self._stack.enter_context(self._patch.context())
        original = less_fast.transfer.to_device
        for name, module in list(sys.modules.items()):
            if name.startswith("less_fast") and vars(module).get("to_device") is original:
                inner.setattr(module, "to_device", self.send)
        run = less_fast.features.run

        def running(*args: Any, **options: Any) -> Tensor:
            self.running = True
            try:
                return run(*args, **options)
            finally:
                self.running = False

        inner.setattr(less_fast.features, "run", running)
        self._stack.enter_context(_Methods(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Methods(TorchFunctionMode):
    """Ways from a tensor to the host that are no operation of the dispatcher."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and self.syncs.on_device(args[0]):
            self.syncs.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(self.syncs.on_device(tensor) for tensor in given)
        name = str(func).removeprefix("aten.")
        masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
        if on_device and (name.startswith(_READS) or (name.startswith(_INDEXED) and masks)):
            self.syncs.found.append(name)
        out = func(*args, **(kwargs or {}))
        # What a pass makes from nothing (positions, masks, zeros), it makes on the device.
        if on_device or (not given and self.syncs.running):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.syncs.mark(leaf)
        return out
