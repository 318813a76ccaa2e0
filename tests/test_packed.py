"""Packed batches give the features of padded ones, or are refused with a reason; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, adapted, batch, causal_lm, gradients
from support.syncs import Syncs
from support.varlen import KERNELS
from torch import Tensor, nn

import less_fast.model.packed as packed
from less_fast.errors import LessFastError
from less_fast.features import FeatureExtractor, MultiFeatureExtractor, Output
from less_fast.model.capture import deterministic
from less_fast.model.packed import EXAMPLE_BY_EXAMPLE, NAME, attending, choose_layout, supports_packing
from less_fast.model.varlen import VarlenKernel
from less_fast.projection import Projection
from less_fast.segments import Segments

SRHT = Projection("srht", 256)
TOLERANCE = 1e-5
# Windows below the longest example's 17 tokens: one for all layers, one for every other layer.
WINDOWED = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
MODELS = [(name, {}) for name in ARCHITECTURES if name != "gemma2"] + list(WINDOWED.items())


def mixed_batch() -> dict[str, Tensor]:
    """Long and short examples, one of a single token, one without labels, and one without any token."""
    data = batch((17, 3, 1, 9, 0, 12))
    data["labels"][3] = -100
    return data


def extractor(model: nn.Module, packing: Any, **settings: Any) -> MultiFeatureExtractor:
    return MultiFeatureExtractor(model, [Output(SRHT)], packing=packing, **settings)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Rows equal up to float32 rounding; rows without a gradient are zero in both."""
    assert bool((got - expected).norm(dim=1).le(TOLERANCE * expected.norm(dim=1)).all())


@pytest.mark.parametrize("architecture, settings", MODELS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_packed_equals_padded(architecture: str, settings: dict[str, Any]) -> None:
    model = adapted(causal_lm(architecture, **settings))
    data = mixed_batch()
    padded, together = extractor(model, "never")(data), extractor(model, "always")(data)
    assert_close(together.features[0], padded.features[0])
    assert together.features[0].any(1).tolist() == [True, True, False, False, False, True]
    torch.testing.assert_close(together.losses, padded.losses)
    assert torch.equal(together.n_labels, padded.n_labels)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_packed_equals_plain_autograd(architecture: str) -> None:
    model = adapted(causal_lm(architecture, **WINDOWED.get(architecture, {})))
    size = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    extract = FeatureExtractor(model, Projection("identity", size), packing="always")
    data = batch(left=True)
    assert_close(extract(data).double(), gradients(model, [p.name for p in extract.layout.parameters], data))


def test_modules_behind_the_label_gather_see_packed_labels() -> None:
    model = causal_lm(tie_word_embeddings=False)
    settings = {"targets": r"lm_head|layers\.1\.mlp\.up_proj"}
    data = mixed_batch()
    padded, together = (extractor(model, how, **settings)(data) for how in ("never", "always"))
    assert_close(together.features[0], padded.features[0])


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    extract = extractor(adapted(causal_lm("mistral", **WINDOWED["mistral"])), "always")
    data = batch((17, 3, 9, 12))
    together = extract(data).features[0]
    assert torch.equal(together, extract(data).features[0])
    for n, length in enumerate((17, 3, 9, 12)):
        assert_close(extract({k: x[n : n + 1, :length] for k, x in data.items()}).features[0], together[n : n + 1])
    others = {**data, "input_ids": data["input_ids"].clone()}
    others["input_ids"][[0, 2], :9] = 7
    assert_close(extract(others).features[0][[1, 3]], together[[1, 3]])


class PreviousToken(nn.Module):
    """Adds each token's predecessor on the row to it: causal, but blind to where an example begins."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def mixing_model() -> nn.Module:
    model = causal_lm()
    layer = model.get_submodule("model.layers.1")
    layer.mlp = PreviousToken(layer.mlp)
    return model


class NoTransformer(nn.Module):
    """Has the interface of a causal model and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return type("Out", (), {"logits": self.proj(self.embed(input_ids))})


SINKS = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["sliding_attention", "full_attention"]}
REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: causal_lm("gemma2"), "softcap"),
    (lambda: causal_lm("gpt_oss", **SINKS), "s_aux"),
    (lambda: causal_lm("bloom", n_layer=2, n_head=4), "0 of the model's 2 layers"),
    (mixing_model, "see tokens of other examples"),
    (NoTransformer, "no exchangeable attention"),
]


@pytest.mark.parametrize("make, word", REFUSED, ids=["gemma2", "gpt_oss", "bloom", "mixing", "no-transformer"])
def test_what_attention_cannot_honour_is_refused_with_the_reason(make: Callable[[], nn.Module], word: str) -> None:
    model = make()
    assert word in (supports_packing(model) or "")
    with pytest.raises(LessFastError, match=f"cannot be packed.*{word}"):
        choose_layout(model, torch.device("cpu"), "always")
    on_cuda = choose_layout(model, torch.device("cuda"), "auto")  # the model itself stays where it is
    assert (on_cuda.packed, on_cuda.own_attention, on_cuda.name) == (False, False, "padded")


def test_auto_pads_on_a_cpu_without_trying_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_probe", lambda model: pytest.fail("the model was tried"))
    for packing in ("auto", "never"):
        assert choose_layout(causal_lm(), torch.device("cpu"), packing).name == "padded"
    with pytest.raises(LessFastError, match=r"packing is 'sometimes'.*auto, always, never"):
        extractor(adapted(causal_lm()), "sometimes")


def test_auto_packs_on_cuda_only_with_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cuda = adapted(causal_lm()), torch.device("cuda")
    without = choose_layout(model, cuda, "auto")
    assert (without.packed, without.own_attention, without.name) == (False, True, "padded")
    assert choose_layout(model, cuda, "always").name == "packed, scaled_dot_product_attention"
    pretend_kernel(monkeypatch)
    assert choose_layout(model, cuda, "auto").name == "packed, varlen_attn"
    assert choose_layout(model, cuda, "never").name == "padded"


def test_padded_rows_through_our_attention_equal_the_models_own() -> None:
    """What a CUDA device does with padded batches."""
    for architecture, settings in (("llama", {}), ("mistral", WINDOWED["mistral"])):
        extract = extractor(adapted(causal_lm(architecture, **settings)), "never")
        expected = extract(mixed_batch()).features[0]
        extract.batches = packed.Layout(packed=False, own_attention=True)
        assert_close(extract(mixed_batch()).features[0], expected)


def test_the_models_own_attention_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(causal_lm())
    config: Any = model.config
    extract = extractor(model, "always")
    extract(batch())
    assert config._attn_implementation == "sdpa"
    seen: list[str] = []

    def fail(module: nn.Module, *_: Any) -> None:
        seen.append(config._attn_implementation)
        raise RuntimeError("interrupted")

    handle = model.get_submodule("base_model.model.model.layers.1").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        extract(batch())
    handle.remove()
    assert seen == [NAME] and config._attn_implementation == "sdpa"
    config._attn_implementation = NAME  # as a program might that keeps the name
    with pytest.raises(LessFastError, match="works only in the passes that less_fast runs"):
        model(input_ids=batch()["input_ids"])


# Kernels.


def pretend_kernel(monkeypatch: pytest.MonkeyPatch, kernel: VarlenKernel = KERNELS[2]) -> None:
    monkeypatch.setattr(packed, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(packed, "refuses", lambda *_: None)


def test_features_through_a_kernel_equal_padded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture, settings in (("llama", {}), ("mistral", WINDOWED["mistral"])):
        model = adapted(causal_lm(architecture, **settings))
        padded = extractor(model, "never")(mixed_batch()).features[0]
        for kernel in KERNELS[1:]:
            pretend_kernel(monkeypatch, kernel)
            extract = extractor(model, "always")
            assert extract.batches.attention == kernel.name
            assert_close(extract(mixed_batch()).features[0], padded)


# Nothing waits for the device.


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 5}], ids=["llama", "mistral"])
@pytest.mark.parametrize("how", ["packed", "kernel", "padded"])
def test_nothing_is_read_back_from_the_device(
    how: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "kernel":
        pretend_kernel(monkeypatch)
    model = adapted(causal_lm("mistral" if settings else "llama", **settings))
    extract = extractor(model, "never" if how == "padded" else "always", backend="reference")
    extract.batches = packed.Layout(how != "padded", own_attention=True)
    data = mixed_batch()
    with Syncs(monkeypatch) as syncs:
        result = extract(data)
    assert syncs.sent >= 5 and syncs.on_device(result.features[0])
    assert syncs.found == []


def test_reading_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: transformers itself looks at the positions of a padded batch."""
    extract = extractor(adapted(causal_lm()), "never", backend="reference")
    with Syncs(monkeypatch) as syncs:
        extract(mixed_batch())
        found = len(syncs.found)
        x = syncs.send(torch.tensor([1.0, 0.0]))
        for read in (x.sum().item, x.tolist, x.nonzero, lambda: x[x > 0], lambda: bool(x[0]), x.cpu, x.double().numpy):
            read()
    assert found >= 1 and len(syncs.found) - found >= 7


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(dtype: torch.dtype, **settings: Any) -> nn.Module:
    return adapted(causal_lm(**settings)).to("cuda", dtype)


@GPU
@pytest.mark.gpu
def test_gpu_packed_bfloat16_is_as_close_as_padded() -> None:
    exact = adapted(causal_lm())
    expected = extractor(exact, "never")(mixed_batch()).features[0].double()
    model = on_gpu(torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    by_layout = {how: extractor(model, how) for how in ("never", "auto")}
    assert by_layout["auto"].batches.packed and by_layout["auto"].batches.attention != EXAMPLE_BY_EXAMPLE
    padded, together = (extract(mixed_batch()).features[0].cpu().double() - expected for extract in by_layout.values())
    assert together.square().mean().sqrt() <= 2 * padded.square().mean().sqrt() + 1e-6 * expected.square().mean().sqrt()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"architecture": "mistral", "sliding_window": 5}], ids=["llama", "mistral"])
@pytest.mark.parametrize("dtype, packing", [("bfloat16", "auto"), ("float32", "auto"), ("float32", "always")])
def test_gpu_does_not_wait_and_repeats_itself(dtype: str, packing: str, settings: dict[str, Any]) -> None:
    extract = extractor(on_gpu(getattr(torch, dtype), **settings), packing)
    first = extract(mixed_batch()).features[0]  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = extract(mixed_batch()).features[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, again)


def test_deterministic_mode_is_put_back_around_attending() -> None:
    """The context of a whole pass and that of a kernel leave torch as they found it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    model = causal_lm()
    with deterministic(torch.device("cpu")), attending(model, Segments.packed((2,), torch.device("cpu"))):
        pass
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
