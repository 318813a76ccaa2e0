"""The extractor on top of the fused kernels, interpreted, against the extractor on top of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fused import fused_features, one_layer
from support.models import adapted, batch, causal_lm
from support.triton_run import in_interpreter, require_triton
from torch import nn

from less_fast.features import MultiFeatureExtractor, Output
from less_fast.optim.adam import AdamState
from less_fast.optim.checkpoint import Moments
from less_fast.projection import Projection

require_triton()


def adam_state(model: nn.Module, rule: str) -> AdamState:
    generator = torch.Generator().manual_seed(3)
    moments = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            m, v = torch.randn(p.shape, generator=generator), torch.rand(p.shape, generator=generator)
            moments[name] = Moments(m * 0.01, v * 1e-4 + 1e-6, 7)
    return AdamState(moments, rule=rule)


@pytest.mark.parametrize(("rank", "packing"), [(3, "never"), (16, "always")])
def test_a_model_through_the_fused_kernels(rank: int, packing: str) -> None:
    """Both orientations, several outputs in one pass, padded or packed; no gradient is written out."""
    outputs = [
        Output(Projection("srht", 256, seed=1), adam_state(one_layer(rank), "less")),
        Output(Projection("srht", 64, seed=2, block=16), adam_state(one_layer(rank), "torch")),
        Output(Projection("srht", 512, seed=1), "sgd"),
        Output(Projection("srht", 256, seed=1), "sgd"),  # reduced from the one before
        Output(Projection("sjlt", 100, seed=3, nnz=2), "sign"),
    ]
    check(outputs, rank, batch(), packing=packing)


def check(outputs: list[Output], rank: int, data: dict[str, Any], **settings: Any) -> None:
    expected = MultiFeatureExtractor(one_layer(rank), outputs, backend="reference")(data).features
    got = in_interpreter(fused_features, outputs, rank, data, **settings)
    for features, wanted in zip(got, expected):
        error = (torch.from_numpy(features) - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(error.max()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["srht", "sjlt"])
def test_a_model_on_a_device(kind: str, dtype: torch.dtype) -> None:
    model = adapted(causal_lm(), 16).to("cuda", dtype)
    outputs = [Output(Projection(kind, 256, seed=1), adam_state(adapted(causal_lm(), 16), "less"))]
    expected = MultiFeatureExtractor(model, outputs, backend="reference")(batch()).features[0]
    features = MultiFeatureExtractor(model, outputs)(batch()).features[0]
    assert float(((features - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-4
    assert torch.equal(features, MultiFeatureExtractor(model, outputs)(batch()).features[0])
