"""Adam's rules against torch.optim, and the alignment of saved optimizer states with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import adapted, batch, causal_lm
from torch import nn

from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.optim.adam import AdamState, precondition_rules


def trained(tmp_path: Path, *, weight_decay: float = 0.0, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A model after five AdamW steps, its optimizer state saved as a Trainer saves it."""
    model = model or adapted(causal_lm())
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-7)
    for step in range(5):
        data = batch(seed=step)
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return model, optimizer


def layout_of(model: nn.Module) -> ParameterLayout:
    return ParameterLayout.build((n, *p.shape) for n, p in model.named_parameters() if "lora_" in n)


def test_rule_torch_is_the_step_that_torch_takes(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    state = AdamState.from_checkpoint(tmp_path, model, rule="torch")
    assert (state.beta1, state.beta2, state.eps) == (0.9, 0.98, 1e-7)  # from the file
    layout = layout_of(model)
    parameters = dict(model.named_parameters())
    before = {p.name: parameters[p.name].detach().clone() for p in layout.parameters}
    optimizer.zero_grad()
    model(**batch(seed=99)).loss.backward()
    grads = {p.name: parameters[p.name].grad.clone() for p in layout.parameters}
    optimizer.step()
    for parameter, rule in zip(layout.parameters, state.rules(layout, torch.device("cpu"))):
        moved = (before[parameter.name] - parameters[parameter.name].detach()) / 1e-3
        gradient = grads[parameter.name]
        short_first = gradient if parameter.short_is_rows else gradient.T
        update = rule.reference(short_first)
        update = update if parameter.short_is_rows else update.T
        # The step itself is lost in the rounding of the weights for all but its leading digits.
        torch.testing.assert_close(update, moved, rtol=2e-3, atol=2e-3)


def test_rule_less_is_the_published_formula(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    state = AdamState.from_checkpoint(tmp_path / "optimizer.pt", model)
    assert (state.rule, state.beta1, state.beta2, state.eps) == ("less", 0.9, 0.999, 1e-8)  # its own constants
    layout = layout_of(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for parameter, rule in zip(layout.parameters, state.rules(layout, torch.device("cpu"))):
        entry = optimizer.state[dict(model.named_parameters())[parameter.name]]
        m, v = entry["exp_avg"].double(), entry["exp_avg_sq"].double()
        g = torch.randn(m.shape, dtype=torch.float64) * 1e-2
        expected = (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g**2 + 1e-8)
        got = rule.reference(g if parameter.short_is_rows else g.T)
        got = got if parameter.short_is_rows else got.T
        assert (got - expected).norm() < 1e-6 * expected.norm()  # the tables are float32
    assert sorted(state.moments) == sorted(names)


def test_name_keyed_states_are_read_and_wrappers_prefixes_dropped(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    by_index = AdamState.from_checkpoint(tmp_path, model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    state = {f"module.{n}": optimizer.state_dict()["state"][i] for i, n in enumerate(names)}
    (tmp_path / "named").mkdir()
    torch.save({"state": state}, tmp_path / "named/optimizer.bin")
    by_name = AdamState.from_checkpoint(tmp_path / "named", model)
    assert all(torch.equal(by_name.moments[n].m, by_index.moments[n].m) for n in names)
    assert by_name.to_dict() == by_index.to_dict()


def test_states_of_whole_models_follow_the_two_weight_decay_groups(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path, weight_decay=0.1, model=causal_lm("qwen2"))
    state = AdamState.from_checkpoint(tmp_path, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(state.moments[name].v, optimizer.state[parameter]["exp_avg_sq"]), name


def test_an_adapter_of_the_same_shapes_on_other_layers_is_refused(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, model=adapted(causal_lm(), target_modules=["q_proj", "k_proj"]))
    model.save_pretrained(tmp_path)
    AdamState.from_checkpoint(tmp_path, model)
    with pytest.raises(LessFastError, match=r"different adapters: .*k_proj\.lora_A.*saved adapter"):
        AdamState.from_checkpoint(tmp_path, adapted(causal_lm(), target_modules=["q_proj", "v_proj"]))


def test_a_state_without_steps_serves_the_rule_that_needs_none(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    content = optimizer.state_dict()
    for entry in content["state"].values():
        del entry["step"]
    torch.save(content, tmp_path / "optimizer.pt")
    layout, device = layout_of(model), torch.device("cpu")
    assert AdamState.from_checkpoint(tmp_path, model).rules(layout, device)
    with pytest.raises(LessFastError, match="has no step, which rule 'torch' needs"):
        AdamState.from_checkpoint(tmp_path, model, rule="torch").rules(layout, device)
    content["param_groups"][0]["step"] = 5  # where other optimizers keep it
    torch.save(content, tmp_path / "optimizer.pt")
    assert AdamState.from_checkpoint(tmp_path, model, rule="torch").rules(layout, device)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    with pytest.raises(LessFastError, match=r"entry 0 has shape \(4, 32\).*lora_A.*\(8, 32\)"):
        AdamState.from_checkpoint(tmp_path, adapted(causal_lm(), rank=8))
    with pytest.raises(LessFastError, match="its groups have 16, 0 parameters, the model trains 8"):
        AdamState.from_checkpoint(tmp_path, adapted(causal_lm(num_hidden_layers=1)))
    with pytest.raises(LessFastError, match="no such file"):
        AdamState.from_checkpoint(tmp_path / "absent", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LessFastError, match=r"no optimizer\.pt"):
        AdamState.from_checkpoint(tmp_path / "empty", model)
    with pytest.raises(LessFastError, match="rule"):
        AdamState.from_checkpoint(tmp_path, model, rule="adamw")
    state = AdamState.from_checkpoint(tmp_path, model)
    other = ParameterLayout.build([("another.lora_A.default.weight", 4, 32)])
    with pytest.raises(LessFastError, match=r"no optimizer state for another\.lora_A"):
        state.rules(other, torch.device("cpu"))
    name = layout_of(model).parameters[0].name
    with pytest.raises(LessFastError, match=r"has shape \(4, 32\), the parameter \(4, 33\)"):
        state.rules(ParameterLayout.build([(name, 4, 33)]), torch.device("cpu"))
    with pytest.raises(LessFastError, match="'sgd', 'sign'"):
        precondition_rules("adamw", layout_of(model), torch.device("cpu"))


@pytest.mark.parametrize(
    "content, word",
    [
        ({"state": {0: {"moment": torch.zeros(2)}}, "param_groups": []}, "expected Adam's exp_avg"),
        ({"state": {}}, "empty"),
        ({"state": {0: {}, "a": {}}}, "mixture"),
        ([1, 2], "key 'state'"),
        ({"state": {"weight": {"exp_avg": torch.full((2, 2), torch.nan), "exp_avg_sq": torch.zeros(2, 2)}}}, "finite"),
        ({"state": {"weight": {"exp_avg": torch.zeros(2, 2), "exp_avg_sq": -torch.ones(2, 2)}}}, "negative"),
        ({"state": {"weight": {"exp_avg": torch.zeros(2, 2).byte(), "exp_avg_sq": torch.zeros(2, 2)}}}, "uint8"),
    ],
)
def test_files_that_are_no_adam_state_are_refused(tmp_path: Path, content: object, word: str) -> None:
    torch.save(content, tmp_path / "optimizer.pt")
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(LessFastError, match=word):
        AdamState.from_checkpoint(tmp_path, model)


def test_files_that_carry_code_or_are_cut_off_are_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("this must not run",)

    torch.save({"state": Payload()}, tmp_path / "optimizer.pt")
    with pytest.raises(LessFastError, match="not a readable optimizer file"):
        AdamState.from_checkpoint(tmp_path, nn.Linear(1, 1))
    (tmp_path / "optimizer.pt").write_bytes((tmp_path / "optimizer.pt").read_bytes()[:100])
    with pytest.raises(LessFastError, match="not a readable optimizer file"):
        AdamState.from_checkpoint(tmp_path, nn.Linear(1, 1))
