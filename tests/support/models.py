"""Small random causal LMs of many architectures, and the plain-autograd oracle for their gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2")


def causal_lm(architecture: str = "llama", **overrides: Any) -> nn.Module:
    """A model with random weights, dropout above zero where the architecture has it, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if architecture == "gpt2":
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64, "n_inner": 48}
    else:
        settings = {**COMMON, "attention_dropout": 0.1, **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    return model.train()


def adapted(model: nn.Module, rank: int = 4, **settings: Any) -> nn.Module:
    """With LoRA (dropout 0.1, non-zero B) on the attention's projections."""
    names = [name for name, _ in model.named_modules()]
    targets = ["c_attn", "c_proj"] if any("c_attn" in n for n in names) else ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(1)
    options = {"target_modules": targets, "lora_dropout": 0.1, "lora_alpha": 2 * rank, **settings}
    model = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(
    lengths: tuple[int, ...] = (17, 3, 9, 12), vocabulary: int = 61, left: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A padded batch; the first third of each example is masked."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.long)
    for n, length in enumerate(lengths):
        at = slice(shape[1] - length, None) if left else slice(length)
        tokens = torch.randint(1, vocabulary, (length,), generator=generator)
        ids[n, at], mask[n, at] = tokens, 1
        labels[n, at] = torch.where(torch.arange(length) < max(1, length // 3), -100, tokens)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model: nn.Module, names: list[str], data: Mapping[str, Tensor]) -> Tensor:
    """(N, P) float64: one backward pass per example of a float64 copy, through the model's own loss."""
    exact = copy.deepcopy(model).double().eval()
    parameters = dict(exact.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    rows = []
    for n in range(len(data["input_ids"])):
        keep = data["attention_mask"][n].bool()
        ids, labels = data["input_ids"][n][keep][None], data["labels"][n][keep][None]
        loss = exact(input_ids=ids, labels=labels).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [parameters[x] for x in names])]))
    return torch.stack(rows)
