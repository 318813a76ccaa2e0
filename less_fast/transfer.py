"""Copies between host and device through pinned memory, so that the host never waits for the device to catch up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; kernels started later see it, and the host goes on at once."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Copies of device tensors on their way to the host; :meth:`wait` returns them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The host's copies; returns when the device has come to the point where they were asked for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
