"""What a CUDA device would be asked to compute by the fused kernels, to be called in the interpreter's process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def taken_for_cuda() -> Iterator[None]:
    """Within the context the fused kernels are asked of tensors on the CPU."""
    from less_fast.ops import fused

    original = fused.refuses
    fused.refuses = lambda device, *rest: original(torch.device("cuda"), *rest)  # type: ignore[assignment]
    try:
        yield
    finally:
        fused.refuses = original


def fused_check(kind: str) -> Any:
    """The doctor's check."""
    from less_fast.doctor import check_fused

    with taken_for_cuda():
        return check_fused(kind, "cpu")


def one_layer(rank: int) -> nn.Module:
    """A model with eight adapter matrices, no more: the interpreter takes seconds for each."""
    from support.models import adapted, causal_lm

    return adapted(causal_lm(num_hidden_layers=1), rank)


def fused_features(outputs: Sequence[Any], rank: int, data: dict[str, Tensor], **settings: Any) -> list[np.ndarray]:
    """Features of a tiny model; a matrix whose gradients are written out is an error."""
    from less_fast.features import MultiFeatureExtractor
    from less_fast.ops import outer_sketch

    original = outer_sketch.outer_sketch_reference
    outer_sketch.outer_sketch_reference = _refused  # type: ignore[assignment]
    try:
        with taken_for_cuda():
            extractor = MultiFeatureExtractor(one_layer(rank), outputs, **settings)
            return [features.numpy() for features in extractor(data).features]
    finally:
        outer_sketch.outer_sketch_reference = original


def _refused(*args: Any) -> None:
    raise AssertionError("gradients were written out")
