"""The per-example loss: each example's mean cross-entropy over its own label tokens, logits at those positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.model.devices import main_device
from less_fast.transfer import to_device

IGNORED = -100


@dataclass(frozen=True)
class LabelPositions:
    """Where a batch's labels are. M is their number.

    ``example``: (M,) int64, the example of each, ascending. ``token``: (M,) where on the flat token axis the logits
    that predict it are. ``target``: (M,) the label. ``weight``: (M,) float32, one over the labels of its example.
    ``counts``: (N,) labels of each example.
    """

    example: Tensor
    token: Tensor
    target: Tensor
    weight: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor, starts: Sequence[int] | None = None) -> LabelPositions:
        """From (N, T) labels, -100 where masked; token t predicts label t + 1.

        ``starts``: where each example begins on the flat token axis; None: the axis is the rows one after the other.
        """
        shifted = labels[:, 1:]
        mask = shifted != IGNORED
        example, position = mask.nonzero(as_tuple=True)
        n, length = labels.shape
        first = torch.arange(n, device=labels.device) * length if starts is None else torch.tensor(starts)
        counts = mask.sum(1)
        weight = (1.0 / counts.clamp(min=1).float())[example]
        return cls(example, first.long()[example] + position, shifted[mask], weight, counts)

    def to(self, device: torch.device) -> LabelPositions:
        """On the device, all but ``counts``, which only the host reads."""
        example, token, target = (to_device(index, device) for index in (self.example, self.token, self.target))
        return LabelPositions(example, token, target, to_device(self.weight, device), self.counts)


def right_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` with each row's tokens moved to its front and the columns of padding alone cut off.

    ``lengths``, int64 (N,), is added. Raises LessFastError for a mask with holes.
    Where padding is on the right, a causal model's real tokens cannot see it, so no attention mask is needed and the
    positions are those of the example alone.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    labels = batch["labels"]
    lengths = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
    if mask is not None:
        mask = mask.bool()
        lengths = mask.sum(1)
        longest = int(lengths.max()) if len(lengths) else 0
        prefix = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        if not torch.equal(prefix, mask):
            rows = (mask != prefix).any(1) & (mask != prefix.flip(1)).any(1)
            if rows.any():
                raise LessFastError(
                    f"the attention mask of example {int(rows.nonzero()[0])} has holes; "
                    "expected padding at one end only"
                )
            order = torch.argsort(~mask, dim=1, stable=True)
            ids, labels = ids.gather(1, order), labels.gather(1, order)
        labels = torch.where(prefix, labels, IGNORED)
        ids, labels = ids[:, :longest], labels[:, :longest]
    return {"input_ids": ids, "labels": labels, "lengths": lengths}


def check_causal(model: nn.Module) -> None:
    """Raise LessFastError where a later token changes an earlier token's logits: padding would then be seen too."""
    probe = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]], device=main_device(model))
    with torch.no_grad():
        first, second = model(input_ids=probe, use_cache=False).logits[:, 0].float()
    # Both rows go through the same operations, so a causal model's differ by rounding at most.
    rounding = 1e-5 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.03
    if float((first - second).abs().max()) > rounding * float(first.abs().max()):
        raise LessFastError(
            f"the model ({type(model).__name__}) lets a token see later ones, so it is not causal; "
            "load it as a decoder (is_decoder=True), or use a causal language model"
        )


def check_length_invariant(model: nn.Module, lengths: Sequence[int]) -> None:
    """Raise LessFastError where the batch's longest example would change its shorter ones.

    Rotary embeddings of the kinds ``dynamic`` and ``longrope`` choose their frequencies by the length of the batch.
    """
    config = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope") or len(set(lengths)) < 2:
        return
    positions: Any = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
    original = int(positions)
    if max(lengths) > original:
        raise LessFastError(
            f"the batch has examples of {min(lengths)} to {max(lengths)} tokens, and beyond {original} "
            f"the model's {rope['rope_type']} rotary embedding depends on the batch; "
            f"use max_length={original} or one length a batch"
        )


@contextmanager
def logits_at(model: nn.Module, shape: torch.Size, labels: LabelPositions) -> Iterator[None]:
    """Within the context the output head sees the hidden states of label positions alone: logits are (1, M, V).

    ``shape`` is (N, T), or (1, tokens) of a packed batch. Everything the model does to logits after its head (scaling,
    soft-capping) is element-wise and stays in place.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        yield
        return

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:2] != shape:
            return None  # a head that is fed in another way computes all logits
        return (args[0].flatten(0, 1)[labels.token.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def label_logits(
    model: nn.Module, input_ids: Tensor, labels: LabelPositions, position_ids: Tensor | None = None
) -> Tensor:
    """Run the model and return the logits that predict the labels: (M, V)."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    with logits_at(model, input_ids.shape, labels):
        output = model(input_ids=input_ids, use_cache=False, **positions)
    logits: Tensor = output.logits.to(input_ids.device)
    n, length = input_ids.shape
    if logits.shape[:2] == (1, labels.target.numel()):
        return logits[0]
    if logits.shape[:2] == (n, length):
        return logits.flatten(0, 1)[labels.token]
    raise LessFastError(
        f"the model's logits have shape {tuple(logits.shape)}; "
        f"expected ({n}, {length}, vocabulary) for input_ids of {n} x {length}"
    )


def example_losses(logits: Tensor, labels: LabelPositions) -> Tensor:
    """(M, V) logits -> (N,) float32: each example's mean cross-entropy; 0 for an example without labels."""
    token_losses = nn.functional.cross_entropy(logits.float(), labels.target, reduction="none")
    losses = token_losses.new_zeros(labels.counts.shape[0])
    return losses.index_add(0, labels.example, token_losses * labels.weight)
