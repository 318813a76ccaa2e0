"""Integer-keyed states: which parameter each number means, by groups, shapes and names; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import adapted, causal_lm
from support.small_training import stepped
from torch import nn

from less_fast.errors import LessFastError
from less_fast.optim.adam import AdamState

Named = list[tuple[str, nn.Parameter]]


def trained(model: nn.Module) -> Named:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def saved(tmp_path: Path, optimizer: torch.optim.Optimizer) -> Path:
    torch.save(stepped(optimizer).state_dict(), tmp_path / "optimizer.pt")
    return tmp_path


def assert_read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every parameter has the moments that the live optimizer holds for it."""
    state = AdamState.from_checkpoint(folder, model)
    assert sorted(state.moments) == sorted(name for name, _ in trained(model))
    for name, parameter in trained(model):
        assert torch.equal(state.moments[name].m, optimizer.state[parameter]["exp_avg"]), name
        assert torch.equal(state.moments[name].v, optimizer.state[parameter]["exp_avg_sq"]), name


def split(named: Named, *tests: Callable[[str, nn.Parameter], bool]) -> list[dict[str, Any]]:
    return [{"params": [p for name, p in named if test(name, p)]} for test in tests]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_trainers_own_groups(architecture: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = causal_lm(architecture)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    assert len(optimizer.param_groups) == 2
    assert_read(saved(tmp_path, optimizer), model, optimizer)


@pytest.mark.parametrize("reverse", [False, True])
def test_groups_by_weight_decay_in_either_order(reverse: bool, tmp_path: Path) -> None:
    model = causal_lm("qwen2")
    groups = split(trained(model), lambda n, p: p.ndim > 1, lambda n, p: p.ndim == 1)
    optimizer = torch.optim.AdamW(groups[::-1] if reverse else groups)
    assert_read(saved(tmp_path, optimizer), model, optimizer)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "q_proj", "v_proj", "o_proj"]])
def test_lora_plus_keeps_a_and_b_apart(targets: list[str], tmp_path: Path) -> None:
    """With embeddings, lora_embedding_B has the shape of lora_B of o_proj: only the known grouping decides."""
    from peft.optimizers import create_loraplus_optimizer

    model = adapted(causal_lm(), target_modules=targets)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert len(optimizer.param_groups) == 4
    assert_read(saved(tmp_path, optimizer), model, optimizer)


def test_other_groups_are_told_apart_by_shapes(tmp_path: Path) -> None:
    """Q (32 x 32) and v (16 x 32): their B have different shapes, their A the same, so A stays in one group."""
    model = adapted(causal_lm(), target_modules=["q_proj", "v_proj"])
    groups = split(
        trained(model),
        lambda n, p: "lora_B" in n and "v_proj" in n,
        lambda n, p: "lora_A" in n,
        lambda n, p: "lora_B" in n and "q_proj" in n,
    )
    optimizer = torch.optim.AdamW(groups)
    assert_read(saved(tmp_path, optimizer), model, optimizer)


def test_a_choice_that_only_later_shapes_decide_is_made(tmp_path: Path) -> None:
    """Both groups begin with a 4 x 3; had the second the first of them, the 5 x 3 that follows would have no place."""
    model = nn.ModuleList([nn.Linear(3, rows, bias=False) for rows in (4, 5, 4, 6)])
    weights = [layer.weight for layer in model]
    optimizer = torch.optim.AdamW([{"params": weights[:2]}, {"params": weights[2:]}])
    assert_read(saved(tmp_path, optimizer), model, optimizer)


def by_projection(model: nn.Module) -> list[dict[str, Any]]:
    return split(trained(model), lambda n, p: "q_proj" in n, lambda n, p: "o_proj" in n)


def by_layer(model: nn.Module) -> list[dict[str, Any]]:
    return split(trained(model), *(lambda n, p, i=i: f"layers.{i}." in n for i in (1, 0)))


@pytest.mark.parametrize("grouping", [by_projection, by_layer])
def test_groups_of_the_same_shapes_are_refused_unless_named(
    grouping: Callable[[nn.Module], Iterable[dict[str, Any]]], tmp_path: Path
) -> None:
    model = adapted(causal_lm(), target_modules=["q_proj", "o_proj"])
    groups = list(grouping(model))
    saved(tmp_path, torch.optim.AdamW(groups))
    with pytest.raises(LessFastError, match=r"its 2 groups fit the model in more than one way .*param_names"):
        AdamState.from_checkpoint(tmp_path, model)
    names = {parameter: name for name, parameter in trained(model)}
    named = [{"params": [(names[p], p) for p in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(named)
    assert_read(saved(tmp_path, optimizer), model, optimizer)


def test_lora_plus_on_square_matrices_of_full_rank_is_refused(tmp_path: Path) -> None:
    model = adapted(causal_lm(), rank=32, target_modules=["q_proj", "o_proj"])
    saved(tmp_path, torch.optim.AdamW(split(trained(model), lambda n, p: "_A" in n, lambda n, p: "_B" in n)))
    with pytest.raises(LessFastError, match="more than one way"):
        AdamState.from_checkpoint(tmp_path, model)


def test_many_groups_of_one_shape_are_refused_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(24)))
    groups = [{"params": [a.weight, b.weight]} for a, b in zip(model[:12], model[12:])]
    saved(tmp_path, torch.optim.AdamW(groups))
    with pytest.raises(LessFastError, match="its 12 groups fit the model in more than one way"):
        AdamState.from_checkpoint(tmp_path, model)


def test_groups_whose_shapes_fit_nowhere_are_refused(tmp_path: Path) -> None:
    model = adapted(causal_lm(), target_modules=["q_proj", "v_proj"])
    groups = split(trained(model), lambda n, p: "lora_A" in n, lambda n, p: "lora_B" in n)
    groups[1]["params"].reverse()
    saved(tmp_path, torch.optim.AdamW(groups))
    with pytest.raises(LessFastError, match="the shapes in its 2 groups fit no order of the model's parameters"):
        AdamState.from_checkpoint(tmp_path, model)


def test_parameters_that_had_no_gradient_have_no_moments(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model[1](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = AdamState.from_checkpoint(tmp_path, model)
    assert sorted(state.moments) == ["1.bias", "1.weight"]
    assert torch.equal(state.moments["1.weight"].m, optimizer.state[model[1].weight]["exp_avg"])


def test_constants_come_from_the_groups_where_they_agree(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    groups = [{"params": model[0].parameters(), "betas": (0.9, 0.95)}, {"params": model[1].parameters()}]
    saved(tmp_path, torch.optim.AdamW(groups, eps=1e-6))
    with pytest.raises(LessFastError, match=r"several values of beta2 \(0\.95, 0\.999\).*give beta2="):
        AdamState.from_checkpoint(tmp_path, model, rule="torch")
    state = AdamState.from_checkpoint(tmp_path, model, rule="torch", beta2=0.95)
    assert (state.beta1, state.beta2, state.eps) == (0.9, 0.95, 1e-6)
    assert AdamState.from_checkpoint(tmp_path, model).beta2 == 0.999  # rule less: its own constants
    content = torch.load(tmp_path / "optimizer.pt")
    names = [name for name, _ in model.named_parameters()]
    (tmp_path / "optimizer.pt").unlink()
    torch.save({"state": dict(zip(names, content["state"].values()))}, tmp_path / "optimizer.bin")
    with pytest.raises(LessFastError, match="has no beta1; rule 'torch' needs one"):
        AdamState.from_checkpoint(tmp_path, model, rule="torch")


def test_a_folder_with_several_states_is_ambiguous(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    saved(tmp_path, torch.optim.AdamW(model.parameters()))
    (tmp_path / "optimizer.bin").write_bytes((tmp_path / "optimizer.pt").read_bytes())
    with pytest.raises(LessFastError, match=r"several .* \(optimizer\.pt, optimizer\.bin\).*name the one"):
        AdamState.from_checkpoint(tmp_path, model)
    assert AdamState.from_checkpoint(tmp_path / "optimizer.bin", model).moments


def test_the_moments_outlive_the_file(tmp_path: Path) -> None:
    """Files are mapped while they are read; a mapping of a file that is then overwritten would kill the process."""
    model = nn.Linear(300, 400)
    optimizer = torch.optim.AdamW(model.parameters())
    state = AdamState.from_checkpoint(saved(tmp_path, optimizer), model)
    expected = optimizer.state[model.weight]["exp_avg"].clone()
    (tmp_path / "optimizer.pt").write_bytes(b"gone")
    assert torch.equal(state.moments["weight"].m, expected)


def test_files_of_old_torch_versions_are_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    optimizer = stepped(torch.optim.AdamW(model.parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert_read(tmp_path, model, optimizer)
