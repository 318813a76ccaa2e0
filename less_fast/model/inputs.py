"""``Inputs``: a batch as the model gets it; checked, laid out and measured on the host, then sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.model.loss import IGNORED, LabelPositions, right_padded
from less_fast.segments import Segments
from less_fast.transfer import to_device


@dataclass(frozen=True)
class Inputs:
    """``input_ids`` (N, T) of a padded batch, or (1, tokens) of a packed one with its ``position_ids``.

    ``tokens``: where each example's tokens are. ``predicting``: the same for its label positions one after the other.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    labels: LabelPositions
    tokens: Segments
    predicting: Segments

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], device: torch.device, *, packed: bool) -> Inputs:
        """From ``input_ids``, ``labels`` and perhaps ``attention_mask`` (N, T) on the host; nothing waits for a device.

        Raises LessFastError for a mask with holes.
        """
        rows = right_padded(dict(batch))
        ids, lengths = rows["input_ids"], rows["lengths"].tolist()
        positions = None
        if packed:
            tokens = Segments.packed(lengths, device)
            column = torch.arange(ids.shape[1]).expand(ids.shape)
            real = column < rows["lengths"][:, None]
            ids, positions = ids[real][None], column[real][None]
        else:
            tokens = Segments.padded(lengths, ids.shape[1], device)
        labels = LabelPositions.of(rows["labels"], tokens.starts)
        return cls(
            to_device(ids, device),
            None if positions is None else to_device(positions, device),
            labels.to(device),
            tokens,
            Segments.packed(labels.counts.tolist(), device),
        )


def checked(batch: Mapping[str, Tensor], vocabulary: int | None) -> dict[str, Tensor]:
    """The batch on the host; raises LessFastError for what is missing, unknown, of another shape or no token.

    ``vocabulary``: rows of the model's embedding, where it says. Tensors on a device are fetched, which waits for it.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise LessFastError(f"the batch has no {name!r}; it has {sorted(batch)}")
    if unknown := sorted(set(batch) - {"input_ids", "labels", "attention_mask"}):
        raise LessFastError(
            f"the batch has {', '.join(unknown)}, which would change nothing; "
            "expected input_ids, labels and attention_mask"
        )
    host = {name: tensor.cpu() for name, tensor in batch.items()}
    ids, labels, mask = host["input_ids"], host["labels"], host.get("attention_mask")
    if ids.ndim != 2 or ids.shape != labels.shape:
        raise LessFastError(f"input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must have one shape (N, T)")
    if mask is not None and mask.shape != ids.shape:
        raise LessFastError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(ids.shape)}")
    if ids.numel() and vocabulary is not None:
        for name, tensor in (("input_ids", ids), ("labels", torch.where(labels == IGNORED, 0, labels))):
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= vocabulary:
                raise LessFastError(
                    f"{name} hold token {low if low < 0 else high}, but the model's embedding has "
                    f"{vocabulary} rows; use the model's own tokenizer"
                )
    return host
