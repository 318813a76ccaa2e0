"""The automatic token budget: its estimate of what a token keeps, against what autograd saves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.models import adapted, batch, causal_lm
from torch import Tensor

from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.budget import auto_token_budget, bytes_per_token, captured_bytes, is_out_of_memory
from less_fast.projection import Projection

LENGTHS = (60, 61, 62, 50)
VOCABULARY = 61


def make(dtype: torch.dtype, *, same_dtype: bool) -> MultiFeatureExtractor:
    """A Llama of 6 layers in the proportions of the 7B one; adapters of its dtype, or in float32 as PEFT makes them."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "head_dim": 32, "num_key_value_heads": 4}
    model = adapted(causal_lm(**sizes, num_hidden_layers=6).to(dtype), rank=8)
    return MultiFeatureExtractor(model.to(dtype) if same_dtype else model, [Output(Projection("srht", 256))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("same_dtype", [True, False], ids=["adapters-alike", "float32-adapters"])
def test_what_a_token_keeps(dtype: torch.dtype, same_dtype: bool) -> None:
    extract = make(dtype, same_dtype=same_dtype)
    weights = {p.untyped_storage().data_ptr() for p in extract.model.parameters()}
    saved: dict[int, Tensor] = {}
    captured: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def watch(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        storage = args[0].untyped_storage()
        captured[storage.data_ptr()] = storage.nbytes()

    handles = [site.module.register_forward_pre_hook(watch) for site in extract.sites]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            extract(batch(LENGTHS))
    finally:
        for handle in handles:
            handle.remove()
    tokens = len(LENGTHS) * max(LENGTHS)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens
    item = torch.empty(0, dtype=dtype).element_size()
    held = captured_bytes(extract.sites, item)
    assert measured == pytest.approx(bytes_per_token(extract.model, extract.sites) - held - 16 * VOCABULARY, rel=0.05)
    # The output of attention is the input of o_proj's adapter and saved as such; it counts in both.
    only_captured = sum(size for place, size in captured.items() if place not in saved) / tokens
    assert only_captured == pytest.approx(held, rel=0.05)


def test_the_budget_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    extract = make(torch.bfloat16, same_dtype=True)
    arguments = extract.model, extract.sites
    assert auto_token_budget(*arguments, torch.device("cpu"), 2048) == 4096
    assert auto_token_budget(*arguments, torch.device("cpu"), 8192) == 8192
    per_token = bytes_per_token(*arguments)
    weights = sum(p.numel() * p.element_size() for p in extract.model.parameters())
    tables = 8 * extract.layout.size
    for tokens, expected in ((10, 256), (700, 700), (5000, 4096), (10**6, 65536)):
        memory = weights + tables + int(tokens * per_token / 0.6) + per_token
        device = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        found = auto_token_budget(*arguments, torch.device("cuda"), 2048)
        assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "srht: out of memory (cudaErrorMemoryAllocation)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_a_full_device_is_recognised_whoever_says_so(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_token_of_checkpointed_layers_keeps_their_inputs_and_what_one_layer_has() -> None:
    extract = make(torch.bfloat16, same_dtype=True)
    arguments = extract.model, extract.sites
    logits = 16 * VOCABULARY
    kept, fewer = (bytes_per_token(*arguments, checkpointed) - logits for checkpointed in (False, True))
    assert fewer == 6 * 2 * 128 + kept // 6
