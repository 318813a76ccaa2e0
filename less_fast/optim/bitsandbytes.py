"""bitsandbytes' Adam states: 8-bit codes dequantised block by block through the maps saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less_fast.errors import LessFastError

# Recent versions put their tensors one level down, so that FSDP passes them by.
_NESTED = "__bnb_optimizer_quant_state__"
# Entries per scale: 2048 up to version 0.44, 256 since.
_BLOCKS = (256, 2048)


def unwrap(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with bitsandbytes' nested tensors beside the rest; any other entry as it is."""
    nested = entry.get(_NESTED)
    if not isinstance(nested, Mapping):
        return dict(entry)
    return {**{key: value for key, value in entry.items() if key != _NESTED}, **nested}


def moments(source: Path, name: str, entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """First and second moment of an unwrapped entry, in the parameter's shape.

    Parameters below ``min_8bit_size`` and those overridden to 32 bits are kept in float32 and come back as they are.
    Raises LessFastError where codes, maps and scales do not belong together.
    """
    first, second = (_moment(source, name, entry, number) for number in (1, 2))
    return first, second


def _moment(source: Path, name: str, entry: Mapping[str, Any], number: int) -> Tensor:
    codes = entry[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes
    levels, scales = entry.get(f"qmap{number}"), entry.get(f"absmax{number}")
    if levels is None or scales is None:
        raise LessFastError(
            f"{source}: the 8-bit state{number} of {name} has no qmap{number} and absmax{number}; expected block-wise "
            "quantisation; states with one scale per tensor (block_wise=False) are not read: train with block_wise=True"
        )
    size = codes.numel()
    block = next((block for block in _BLOCKS if -(-size // block) == scales.numel()), None)
    if levels.numel() != 256 or block is None:
        raise LessFastError(
            f"{source}: the 8-bit state{number} of {name} has {size} codes, {levels.numel()} levels and "
            f"{scales.numel()} scales; expected 256 levels and a scale for every {' or '.join(map(str, _BLOCKS))} "
            "codes; the file is damaged or of an unknown version of bitsandbytes"
        )
    values = levels.float().index_select(0, codes.reshape(-1).int())
    scales = scales.reshape(-1).float()
    n_full = size // block
    values[: n_full * block].view(n_full, block).mul_(scales[:n_full, None])
    values[n_full * block :] *= scales[n_full:]  # the last block, where it is not full
    return values.view(codes.shape)
