"""Models that do not fit one device as they are: 4- and 8-bit base weights, and checkpointed activations."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle
from support.large_models import (
    adam_state,
    adam_update,
    assert_within_tolerance,
    live_tensors,
    save_adapted,
    with_weights_of,
)
from support.models import adapted, batch, causal_lm, gradients
from support.tiny import examples
from torch import Tensor, nn

from less_fast import FeatureExtractor, LessFastError, Projection, extract, load_model
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model import varlen
from less_fast.model.budget import bytes_per_token
from less_fast.model.load import fingerprint

PROJECTION = Projection("srht", 256, seed=4)
LENGTHS = (17, 3, 9, 12)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_adapted(tmp_path_factory.mktemp("large"))


def quantised(paths: tuple[Path, Path], name: str) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    return load_model(*paths, device="cpu", quantization=name)[0]


def plain_twin(paths: tuple[Path, Path], model: nn.Module) -> nn.Module:
    """The float32 model with the same dequantised weights."""
    return with_weights_of(load_model(*paths, device="cpu")[0], model)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def alone(extractor: FeatureExtractor, data: dict[str, Tensor]) -> Tensor:
    """Each example in a batch of its own."""
    rows = [{name: tensor[n : n + 1, :length] for name, tensor in data.items()} for n, length in enumerate(LENGTHS)]
    return torch.cat([extractor(row) for row in rows])


@pytest.mark.parametrize("rule", ["sgd", "less"])
def test_features_on_a_4_bit_base_are_those_on_its_dequantised_weights(paths: tuple[Path, Path], rule: str) -> None:
    model = quantised(paths, "4bit")
    plain = plain_twin(paths, model)
    state = adam_state(plain)
    precondition = state if rule == "less" else "sgd"
    extractor = FeatureExtractor(model, PROJECTION, precondition)
    data = batch(LENGTHS)
    names = [p.name for p in extractor.layout.parameters]
    assert len(names) == 2 * 2 * 5 and all(".lora_" in name for name in names)
    exact = gradients(plain, names, data)
    if rule == "less":
        exact = adam_update(state, names, exact)
    exact = exact @ torch.from_numpy(oracle.matrix(PROJECTION, extractor.layout)).T
    found = extractor(data)
    assert_within_tolerance(found, FeatureExtractor(plain, PROJECTION, precondition)(data), exact)
    assert torch.equal(found, extractor(data))
    assert relative_error(alone(extractor, data), found) < 1e-5
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_features_on_an_8_bit_base_are_those_of_each_example_alone(paths: tuple[Path, Path]) -> None:
    model = quantised(paths, "8bit")
    extractor = FeatureExtractor(model, PROJECTION)
    data = batch(LENGTHS)
    data["input_ids"][1, 0] = 59  # one with a large activation would draw the others' columns with it
    model.get_input_embeddings().weight.data[59] *= 30.0
    found = extractor(data)
    assert torch.equal(found, extractor(data))
    assert relative_error(alone(extractor, data), found) < 1e-4
    # Activations are rounded to 8 bits on the way.
    plain = plain_twin(paths, model)
    plain.get_input_embeddings().weight.data[59] *= 30.0
    expected = FeatureExtractor(plain, PROJECTION)(data)
    assert 1e-5 < relative_error(found, expected) < 0.2


def test_8_bit_layers_with_outlier_columns_are_refused(paths: tuple[Path, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(paths[0], quantization_config=settings, device_map={"": "cpu"})
    model = PeftModel.from_pretrained(base, paths[1])
    with pytest.raises(LessFastError, match=r"q_proj\.base_layer is an 8-bit layer with outlier threshold 6"):
        FeatureExtractor(model, PROJECTION)


def test_a_4_bit_base_keeps_its_gradient_on_every_cpu(paths: tuple[Path, Path]) -> None:
    """In eval mode bitsandbytes may repack weights for a product in bfloat16 that autograd does not see."""
    bnb = pytest.importorskip("bitsandbytes")
    model = quantised(paths, "4bit")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    expected = FeatureExtractor(model, PROJECTION)(batch())
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    assert torch.equal(FeatureExtractor(model, PROJECTION)(batch()), expected)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    layers[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(LessFastError, match="repacked by a forward pass without gradients"):
        FeatureExtractor(model, PROJECTION)


def test_a_store_of_a_quantised_model_is_made_and_told_from_others(paths: tuple[Path, Path], tmp_path: Path) -> None:
    model = quantised(paths, "4bit")
    prints = [fingerprint(m) for m in (model, quantised(paths, "4bit"), load_model(*paths, device="cpu")[0])]
    assert prints[0] == prints[1]
    assert prints[0]["model"] != prints[2]["model"] and prints[0]["adapter"] == prints[2]["adapter"]
    store = extract(model, examples("sums", 6), tmp_path / "store", projection=PROJECTION, progress=False)
    assert len(store) == 6 and all(store.norms > 0)
    assert fingerprint(model) == prints[0]


def test_wrong_loading_options_are_refused_by_name(paths: tuple[Path, Path]) -> None:
    with pytest.raises(LessFastError, match="quantization is '3bit'; expected one of 4bit, 8bit"):
        load_model(*paths, quantization="3bit")
    with pytest.raises(LessFastError, match="device is 'cpu' beside a device_map"):
        load_model(*paths, device="cpu", device_map="auto")


# Activation checkpointing


@pytest.mark.parametrize("packing", ["never", "always"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_checkpointed_activations_change_no_bit(architecture: str, packing: Any) -> None:
    if architecture == "gemma2" and packing == "always":
        pytest.skip("gemma2 caps its attention scores, so its batches cannot be packed")
    model = adapted(causal_lm(architecture))
    state = adam_state(model)
    expected = FeatureExtractor(model, PROJECTION, state, packing=packing)(batch())
    extractor = FeatureExtractor(model, PROJECTION, state, packing=packing, checkpoint_activations=True)
    assert torch.equal(extractor(batch()), expected)
    assert torch.equal(extractor(batch()), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_checkpointing_goes_with_weights_of_the_models_own(paths: tuple[Path, Path]) -> None:
    for model, targets in ((causal_lm("qwen2"), r"layers\.\d\.mlp"), (quantised(paths, "4bit"), None)):
        without, within = (
            FeatureExtractor(model, PROJECTION, targets=targets, checkpoint_activations=on)(batch())
            for on in (False, True)
        )
        assert without.any() and torch.equal(without, within)


def test_checkpointed_activations_need_less_memory() -> None:
    model = adapted(causal_lm(num_hidden_layers=8, intermediate_size=128))
    data = batch((60, 60, 60, 60))
    most = {}
    for on in (False, True):
        extractor = MultiFeatureExtractor(model, [Output(Projection("srht", 64))], checkpoint_activations=on)
        extractor(data)
        with live_tensors() as live:
            extractor(data)
        most[on] = live.most
    kept = 240 * bytes_per_token(model, extractor.sites)
    assert most[False] > 0.7 * kept  # the measure sees what a pass keeps
    assert most[True] < 0.4 * most[False]


def test_saved_tensors_of_checkpointed_layers_are_their_inputs_alone() -> None:
    model = adapted(causal_lm(num_hidden_layers=8, intermediate_size=128))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for on, found in saved.items():
        extractor = FeatureExtractor(model, Projection("srht", 64), checkpoint_activations=on)

        def pack(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            extractor(batch((60, 60, 60, 60)))
    hidden = 4 * 240 * 32
    logits = 240 * 61 * 4 * 3
    assert sum(saved[True].values()) < 8 * hidden + 4 * hidden + logits
    assert sum(saved[False].values()) > 5 * sum(saved[True].values())


def test_a_backward_pass_in_another_thread_computes_anew_what_the_first_one_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, whose backward pass has threads of its own: the attention of packed batches goes by a context."""
    model = adapted(causal_lm())
    extractor = FeatureExtractor(model, PROJECTION, packing="always", checkpoint_activations=True)
    expected = extractor(batch())
    backward = Tensor.backward

    def elsewhere(tensor: Tensor) -> None:
        thread = threading.Thread(target=backward, args=(tensor,))
        thread.start()
        thread.join()

    monkeypatch.setattr(Tensor, "backward", elsewhere)
    assert torch.equal(extractor(batch()), expected)


def test_attention_that_keeps_its_own_graph_keeps_none_in_a_checkpoint() -> None:
    """The strictly deterministic backward pass of attention on a GPU, here on the CPU."""
    operands = [torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=n < 2) for n in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = []
    for on in (False, True):
        token = varlen.in_checkpoint.set(on)
        try:
            out = varlen._Deterministic.apply(attend, *operands)
        finally:
            varlen.in_checkpoint.reset(token)
        assert (out.grad_fn.graph is None) is on
        found.append(torch.autograd.grad(out.square().sum(), operands[:2]))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_what_cannot_be_checkpointed_is_refused() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return type("Out", (), {"logits": self.head(self.embed(input_ids))})

    assert FeatureExtractor(Alone(), PROJECTION, targets="head")(batch()).any()
    with pytest.raises(LessFastError, match="Alone has no layer that transformers can checkpoint"):
        FeatureExtractor(Alone(), PROJECTION, targets="head", checkpoint_activations=True)


class Twice(nn.Module):
    """Calls one Linear two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + self.inner(x)


def test_a_shared_module_is_still_told_from_one_that_is_computed_anew() -> None:
    model: Any = causal_lm()
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = Twice(mlp.up_proj)
    extractor = FeatureExtractor(model, PROJECTION, targets="up_proj.inner", checkpoint_activations=True)
    with pytest.raises(LessFastError, match="called more than once"):
        extractor(batch())
