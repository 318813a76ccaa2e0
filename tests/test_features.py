"""Batched features against one backward pass per example in float64 and the explicit matrix."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support import oracle
from support.models import ARCHITECTURES, adapted, batch, causal_lm, gradients
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.features import FeatureExtractor, MultiFeatureExtractor, Output
from less_fast.layout import ParameterLayout
from less_fast.model.capture import run
from less_fast.model.inputs import Inputs, checked
from less_fast.model.sites import find_sites
from less_fast.ops.accumulate import accumulate
from less_fast.ops.outer_sketch import outer_sketch
from less_fast.ops.rule import Rule
from less_fast.optim.adam import AdamState
from less_fast.optim.checkpoint import Moments
from less_fast.projection import Projection
from less_fast.segments import Segments

TOLERANCE = 1e-5
PROJECTIONS = [
    Projection("identity", 1),
    Projection("rademacher", 128, seed=1),
    Projection("gaussian", 128, seed=2),
    Projection("sjlt", 128, seed=3),
    Projection("sjlt", 128, seed=3, nnz=4),
    Projection("srht", 128, seed=4, block=16),
    Projection("srht", 256, seed=4),
]


def adam_state(model: nn.Module, rule: str, scale: float = 0.01) -> AdamState:
    """Moments about the size of these models' gradients."""
    generator = torch.Generator().manual_seed(3)
    moments = {
        name: Moments(
            torch.randn(p.shape, generator=generator) * scale,
            (torch.rand(p.shape, generator=generator) + 0.01) * scale**2,
            7,
        )
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    return AdamState(moments, rule=rule)


def adam_update(state: AdamState, names: list[str], grads: Tensor) -> Tensor:
    """The rules as published, on the flat float64 gradient."""
    m = torch.cat([state.moments[n].m.flatten() for n in names]).double()
    v = torch.cat([state.moments[n].v.flatten() for n in names]).double()
    if state.rule == "less":
        return (0.9 * m + 0.1 * grads) / torch.sqrt(0.999 * v + 0.001 * grads**2 + 1e-8)
    step = 7 + 1
    m_hat = (0.9 * m + 0.1 * grads) / (1 - 0.9**step)
    v_hat = (0.999 * v + 0.001 * grads**2) / (1 - 0.999**step)
    return m_hat / (v_hat.sqrt() + 1e-8)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def names_of(layout: ParameterLayout) -> list[str]:
    return [p.name for p in layout.parameters]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_every_architecture_equals_plain_autograd(architecture: str, left: bool) -> None:
    model = adapted(causal_lm(architecture))
    data = batch(left=left)
    extractor = FeatureExtractor(model, Projection("identity", _size(model)))
    names = names_of(extractor.layout)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]  # nothing trained is left out
    assert relative_error(extractor(data), gradients(model, names, data)) < TOLERANCE


@pytest.mark.parametrize("rule", ["sgd", "sign", "less", "torch"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: f"{p.kind}-{p.dim}-{p.nnz}")
def test_every_kind_and_rule_equals_the_explicit_matrix(projection: Projection, rule: str) -> None:
    model = adapted(causal_lm(num_hidden_layers=1), rank=3)
    if projection.kind == "identity":
        projection = Projection("identity", _size(model))
    precondition = rule if rule in ("sgd", "sign") else adam_state(model, rule)
    extractor = FeatureExtractor(model, projection, precondition)
    data = batch()
    names = names_of(extractor.layout)
    grads = gradients(model, names, data)
    if isinstance(precondition, AdamState):
        update = adam_update(precondition, names, grads)
    else:
        update = grads.sign() if rule == "sign" else grads
    expected = update @ torch.from_numpy(oracle.matrix(projection, extractor.layout)).T
    # A gradient entry that float32 rounds to the other side of zero changes a whole unit of sign(g).
    assert relative_error(extractor(data), expected) < (TOLERANCE if rule != "sign" else 0.02)


@pytest.mark.parametrize("rank", [1, 8, 16, 128])
@pytest.mark.parametrize("rule", ["less", "torch"])
def test_every_rank(rank: int, rule: str) -> None:
    model = adapted(causal_lm(num_hidden_layers=1), rank=rank)
    state = adam_state(model, rule)
    projection = Projection("srht", 512, seed=9)
    extractor = FeatureExtractor(model, projection, state)
    names = names_of(extractor.layout)
    data = batch((20, 20, 11, 5, 2))
    update = adam_update(state, names, gradients(model, names, data))
    expected = update @ torch.from_numpy(oracle.matrix(projection, extractor.layout)).T
    assert relative_error(extractor(data), expected) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_linears_by_name_pattern(architecture: str) -> None:
    model = causal_lm(architecture)
    targets = r"layers\.1\..*(up_proj|down_proj)$|lm_head" if architecture == "llama" else r"h\.0\.mlp\.c_"
    if architecture == "llama":
        model = causal_lm(architecture, tie_word_embeddings=False)
    data = batch()
    size = MultiFeatureExtractor(model, [Output(Projection("sjlt", 8))], targets=targets).layout.size
    extractor = FeatureExtractor(model, Projection("identity", size), targets=targets)
    names = names_of(extractor.layout)
    assert len(names) == (3 if architecture == "llama" else 2)
    assert relative_error(extractor(data), gradients(model, names, data)) < TOLERANCE
    alone = {name: tensor[:1] for name, tensor in data.items()}
    assert relative_error(extractor(alone), gradients(model, names, alone)) < TOLERANCE


def test_neighbours_and_order_do_not_matter_and_runs_are_bitwise_equal() -> None:
    model = adapted(causal_lm())
    extractor = FeatureExtractor(model, Projection("srht", 256), adam_state(model, "less"))
    data = batch((17, 3, 9, 12, 17, 1))
    together = extractor(data)
    assert torch.equal(together, extractor(data))
    for n, length in enumerate((17, 3, 9, 12, 17)):
        alone = extractor({name: tensor[n : n + 1, :length] for name, tensor in data.items()})
        assert relative_error(alone, together[n : n + 1].double()) < TOLERANCE
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = extractor({name: tensor[order] for name, tensor in data.items()})
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-5 * float(together.abs().max()))


@pytest.mark.parametrize("rule", ["sgd", "less"])
def test_rows_without_labels_are_zero_and_disturb_nobody(rule: str) -> None:
    model = adapted(causal_lm())
    precondition = adam_state(model, rule) if rule == "less" else rule
    extractor = MultiFeatureExtractor(model, [Output(Projection("srht", 256), precondition)])
    data = batch()
    before = extractor(data)
    data["labels"][1] = -100
    after = extractor(data)
    assert after.n_labels.tolist()[1] == 0 and not after.features[0][1].any()
    torch.testing.assert_close(after.features[0][0], before.features[0][0], rtol=1e-5, atol=1e-5)
    data["labels"][:] = -100
    assert not extractor(data).features[0].any()
    empty = {name: tensor[:0] for name, tensor in data.items()}
    assert extractor(empty).features[0].shape == (0, 256)


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(causal_lm())
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    FeatureExtractor(model, Projection("srht", 256))(batch())
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sum_of_rows_is_autograds_gradient_of_the_summed_loss() -> None:
    model = adapted(causal_lm())
    data = batch((10, 10, 10))
    extractor = FeatureExtractor(model, Projection("identity", _size(model)))
    model.eval()
    logits = model(input_ids=data["input_ids"]).logits[:, :-1]
    token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"][:, 1:], reduction="none")
    loss = (token.sum(1) / (data["labels"][:, 1:] != -100).sum(1)).sum()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [parameters[n] for n in names_of(extractor.layout)])
    torch.testing.assert_close(extractor(data).sum(0), torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)


def test_several_outputs_in_one_pass_equal_single_ones() -> None:
    model = adapted(causal_lm())
    state = adam_state(model, "less")
    outputs = [
        Output(Projection("srht", 512, seed=2), state),
        Output(Projection("srht", 128, seed=2), state),
        Output(Projection("srht", 128, seed=2), "sgd"),
        Output(Projection("sjlt", 300, seed=2), state),
        Output(Projection("sjlt", 100, seed=2), state),
        Output(Projection("rademacher", 64, seed=2), state),
        Output(Projection("rademacher", 40, seed=2), state),
        Output(Projection("srht", 192, seed=2), state),
    ]
    engine = MultiFeatureExtractor(model, outputs)
    assert engine._source == [0, 0, 2, 3, 3, 5, 5, 7]  # folds and prefixes are not computed twice
    for output, got in zip(outputs, engine(batch()).features):
        alone = FeatureExtractor(model, output.projection, output.precondition)(batch())
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_half_precision_models_run_and_agree() -> None:
    exact = adapted(causal_lm())
    expected = FeatureExtractor(exact, Projection("srht", 256))(batch()).double()
    low = adapted(causal_lm().to(torch.bfloat16))
    low.load_state_dict(exact.state_dict())
    got = FeatureExtractor(low, Projection("srht", 256))(batch()).double()
    cosine = torch.nn.functional.cosine_similarity(got, expected)
    assert (cosine > 0.99).all()


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embedding"),
    ],
    ids=["dora", "modules_to_save", "embedding"],
)
def test_unsupported_adapters_are_refused_by_name(settings: dict[str, Any], word: str) -> None:
    model = adapted(causal_lm(), **settings)
    with pytest.raises(LessFastError, match=word):
        FeatureExtractor(model, Projection("srht", 256))


def test_bad_models_and_batches_are_named() -> None:
    projection = Projection("srht", 256)
    with pytest.raises(LessFastError, match="no LoRA weights"):
        FeatureExtractor(causal_lm(), projection)
    with pytest.raises(LessFastError, match="no Linear layer"):
        FeatureExtractor(causal_lm(), projection, targets="nothing_like_it")
    with pytest.raises(LessFastError, match="Embedding"):
        FeatureExtractor(causal_lm(), projection, targets="embed_tokens")
    with pytest.raises(LessFastError, match="shared with"):
        FeatureExtractor(causal_lm("gemma"), projection, targets="lm_head")
    model = adapted(causal_lm())
    with pytest.raises(LessFastError, match=r"AdamState\.from_checkpoint"):
        FeatureExtractor(model, projection, "adam")
    with pytest.raises(LessFastError, match="dim = 7"):
        FeatureExtractor(model, Projection("identity", 7))
    extractor = FeatureExtractor(model, projection)
    data = batch()
    with pytest.raises(LessFastError, match="'labels'"):
        extractor({"input_ids": data["input_ids"]})
    with pytest.raises(LessFastError, match="one shape"):
        extractor({"input_ids": data["input_ids"], "labels": data["labels"][:, 1:]})
    with pytest.raises(LessFastError, match="position_ids"):
        extractor({**data, "position_ids": data["input_ids"]})
    holes = data["attention_mask"].clone()
    holes[2, 4] = 0
    with pytest.raises(LessFastError, match="example 2 has holes"):
        extractor({**data, "attention_mask": holes})
    for name in ("input_ids", "labels"):
        for token in (61, -7):
            wrong = data[name].clone()
            wrong[0, 5] = token
            with pytest.raises(LessFastError, match=f"{name} hold token {token}, .*61 rows"):
                extractor({**data, name: wrong})


def test_what_is_not_a_causal_decoder_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=61, **sizes))
    with pytest.raises(LessFastError, match="not causal"):
        FeatureExtractor(bert, Projection("srht", 64), targets="query")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(LessFastError, match="encoder-decoder"):
        FeatureExtractor(t5, Projection("srht", 64), targets="q$")


def test_rotary_embeddings_that_follow_the_batch_are_refused_where_they_would_matter() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = adapted(causal_lm(rope_parameters=rope, max_position_embeddings=10))
    extractor = FeatureExtractor(model, Projection("srht", 256))
    with pytest.raises(LessFastError, match="depends on the batch"):
        extractor(batch((17, 3)))
    assert extractor(batch((10, 3))).any() and extractor(batch((17, 17))).any()


def test_only_active_adapters_count_and_disabled_ones_are_refused() -> None:
    model = adapted(causal_lm())
    alone = FeatureExtractor(model, Projection("srht", 256))
    expected = alone(batch())
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    extractor = FeatureExtractor(model, Projection("srht", 256))
    assert extractor.layout == alone.layout
    assert torch.equal(extractor(batch()), expected)
    with model.disable_adapter(), pytest.raises(LessFastError, match=r"lora_A.*was not called"):
        extractor(batch())


def test_trained_biases_are_refused() -> None:
    with pytest.raises(LessFastError, match="bias='lora_only'"):
        FeatureExtractor(adapted(causal_lm("qwen2"), bias="lora_only"), Projection("srht", 256))


def test_inference_mode_around_the_call_changes_nothing() -> None:
    model = adapted(causal_lm())
    extractor = FeatureExtractor(model, Projection("srht", 256))
    expected = extractor(batch())
    with torch.inference_mode():
        assert torch.equal(extractor(batch()), expected)


class SequenceFirst(nn.Module):
    """Hands its Linear the tokens before the examples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_another_order_of_dimensions_is_refused_by_name() -> None:
    model = causal_lm()
    layer = model.get_submodule("model.layers.0")
    layer.mlp.up_proj = SequenceFirst(layer.mlp.up_proj)
    extractor = FeatureExtractor(model, Projection("srht", 256), targets=r"up_proj\.inner")
    with pytest.raises(LessFastError, match=r"up_proj\.inner.*expected 4 examples"):
        extractor(batch())


class Twice(nn.Module):
    """Calls one Linear two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inner(*args, **kwargs)
        return self.inner(*args, **kwargs)


def test_a_module_called_twice_is_refused_by_name() -> None:
    model = causal_lm()
    layer = model.get_submodule("model.layers.0")
    layer.mlp.up_proj = Twice(layer.mlp.up_proj)
    extractor = FeatureExtractor(model, Projection("srht", 256), targets="up_proj.inner")
    with pytest.raises(LessFastError, match=r"layers\.0\.mlp\.up_proj\.inner.*more than once"):
        extractor(batch())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def _size(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_a_modules_input_is_let_go_when_its_gradient_is_made() -> None:
    """The hooks live as long as the graph; what they hold must not."""
    model = adapted(causal_lm())
    sites, _ = find_sites(model)
    inputs = Inputs.of(checked(batch(), None), torch.device("cpu"), packed=False)
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def receive(site: Any, value: Tensor, gradient: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(value))

    run(model, sites, inputs, receive)
    assert len(seen) == len(sites) and max(alive) <= 1  # the one of the call before, which is only now returning


def test_operands_of_any_strides() -> None:
    """What autograd hands over may be expanded or transposed."""
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout.build([("q.lora_A.default.weight", 4, 70)])
    left = torch.randn(1, 4, generator=generator).expand(12, 4)
    right = torch.randn(70, 12, generator=generator).T
    segments = Segments.packed((5, 7), torch.device("cpu"))
    found, expected = torch.zeros(1, 2, 64), torch.zeros(1, 2, 64, dtype=torch.float64)
    projection = Projection("srht", 64, block=16)
    outer_sketch(found, left, right, segments, layout.parameters[0], 0, projection)
    grads = torch.stack([left[:5].T.double() @ right[:5].double(), left[5:].T.double() @ right[5:].double()])
    accumulate(expected[0], grads, layout.parameters[0], 0, projection, backend="reference")
    assert relative_error(found[0], expected[0]) < 1e-6


def test_tables_that_do_not_fit_are_refused_before_a_kernel_reads_them() -> None:
    layout = ParameterLayout.build([("q.lora_A.default.weight", 4, 70)])
    segments = Segments.packed((5,), torch.device("cpu"))
    for rule in (Rule("adam"), Rule("adam", torch.zeros(3, 3), torch.ones(3, 3))):
        with pytest.raises(LessFastError, match="Adam's table a"):
            outer_sketch(
                torch.zeros(1, 1, 64), torch.zeros(5, 4), torch.zeros(5, 70), segments, layout.parameters[0], 0,
                Projection("srht", 64), rule,
            )  # fmt: skip
