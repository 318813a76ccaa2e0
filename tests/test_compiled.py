"""Regional compilation: which parts, equal features, and a model that is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from support.models import adapted, batch, causal_lm

from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.compiled import compilable, compiled
from less_fast.projection import Projection

SRHT = Projection("srht", 256)


def names(extract: MultiFeatureExtractor) -> list[str]:
    """The compilable parts, without what is in front of the layer's number."""
    parts = {id(part) for part in compilable(extract.model, extract.sites)}
    return [name.partition("layers.")[2] for name, module in extract.model.named_modules() if id(module) in parts]


def test_the_parts_without_adapters_and_attention_are_compiled() -> None:
    attention = MultiFeatureExtractor(adapted(causal_lm()), [Output(SRHT)])
    norms = ["input_layernorm", "post_attention_layernorm"]
    assert names(attention) == [f"{layer}.{part}" for layer in (0, 1) for part in ("mlp", *norms)]
    inside = MultiFeatureExtractor(adapted(causal_lm("qwen3"), target_modules=["up_proj"]), [Output(SRHT)])
    own = ["self_attn.q_norm", "self_attn.k_norm", *norms]
    assert names(inside) == [f"{layer}.{part}" for layer in (0, 1) for part in own]


@pytest.mark.parametrize("packing", ["never", "always"])
def test_compiled_features_are_equal_and_the_model_is_put_back(packing: str) -> None:
    model = adapted(causal_lm())
    extract = MultiFeatureExtractor(model, [Output(SRHT)], packing=packing)  # type: ignore[arg-type]
    batches = [batch(), batch((5, 9, 2))]
    expected = [extract(data).features[0] for data in batches]
    calls = []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    with pytest.raises(KeyboardInterrupt), compiled(model, extract.sites, backend=backend):
        for data, wanted in zip(batches, expected):
            torch.testing.assert_close(extract(data).features[0], wanted, rtol=1e-5, atol=1e-6)
        assert 1 <= len(calls) <= 6  # norms and MLPs of both layers share their graphs, also for other batch sizes
        raise KeyboardInterrupt
    assert not any(module._compiled_call_impl for module in model.modules())
    calls.clear()
    assert torch.equal(extract(batches[0]).features[0], expected[0]) and not calls


def test_parts_that_are_compiled_already_stay_so() -> None:
    model = adapted(causal_lm())
    extract = MultiFeatureExtractor(model, [Output(SRHT)])
    own = model.get_submodule("base_model.model.model.layers.0.mlp")
    own.compile(backend="eager")
    with compiled(model, extract.sites, backend="eager"):
        assert sum(module._compiled_call_impl is not None for module in model.modules()) == 6
    assert [module for module in model.modules() if module._compiled_call_impl is not None] == [own]
