"""LESS's published loop, written plainly from its description: one example a batch, one flat vector of ``p.grad``.

And checkpoints such as LESS leaves: a LoRA adapter, its tokenizer, and ``optimizer.bin`` keyed by parameter name.
LESS's rounding of the vectors to float16 before it projects them is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from less_fast.layout import ParameterLayout

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_checkpoint(folder: Path, base: Path, tokenizer: Any, rank: int = 4, **saving: Any) -> Path:
    """An adapter on the base model with weights unlike zero, the tokenizer, and moments of either size beside eps."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(r=rank, lora_alpha=4 * rank, lora_dropout=0.1, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
            state[name] = {
                "step": torch.tensor(7.0),
                "exp_avg": 1e-3 * torch.randn(parameter.shape),
                "exp_avg_sq": 10 ** (-11 + 5 * torch.rand(parameter.shape)),
            }
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    torch.save({"state": state, "param_groups": []}, folder / "optimizer.bin")
    return folder


def published_updates(
    checkpoint: Path, examples: Sequence[tuple[list[int], list[int]]], gradient_type: str, dtype: torch.dtype
) -> tuple[Tensor, ParameterLayout]:
    """The vectors that LESS projects, float64 (N, P), and which entry is which; examples are (ids, labels)."""
    base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, checkpoint, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.requires_grad = True
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {dtype}
    saved = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    first, second = (torch.cat([saved[name][key].view(-1) for name in trained]) for key in ("exp_avg", "exp_avg_sq"))
    vectors = []
    for ids, labels in examples:
        tokens = torch.tensor([ids])
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=torch.tensor([labels])).loss
        loss.backward()
        gradient = torch.cat([parameter.grad.view(-1) for parameter in trained.values()])
        for parameter in trained.values():
            parameter.grad = None
        if gradient_type == "sign":
            gradient = gradient.sign()
        elif gradient_type == "adam":
            # A gradient in bfloat16 is scaled and squared in bfloat16, and only then added to the float32 moments.
            mean = 0.9 * first + (1 - 0.9) * gradient
            square = 0.999 * second + (1 - 0.999) * gradient**2
            gradient = mean / (square + 1e-8).sqrt()
        vectors.append(gradient.double())
    layout = ParameterLayout.build((name, *parameter.shape) for name, parameter in trained.items())
    return torch.stack(vectors), layout


def cosines(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> Tensor:
    """Of each row with the same row, in float64."""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return nn.functional.cosine_similarity(a, b, dim=1)
