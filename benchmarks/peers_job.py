"""The work that all peers are given: examples, a model with a trained adapter, Adam's state, and the exact answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data_folder, example_batches, llama
from numpy.typing import NDArray
from torch import Tensor, nn

from less_fast.data import plan_batches

WARM_UP_STEPS, WARM_UP_BATCH = 16, 4
MAX_LENGTH = 1024

Tokens = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Prepared:
    """The job's folder, its examples, and what the workers' features are compared with.

    ``exact``: rule -> float64 (N, P) vectors, in the order of the model's parameters.
    """

    folder: Path
    source: str
    examples: list[Tokens]
    exact: dict[str, NDArray[np.float64]]

    @property
    def tokens(self) -> int:
        """How many tokens the examples have."""
        return sum(len(ids) for ids, _ in self.examples)

    @property
    def p(self) -> int:
        """How many entries a gradient has."""
        return self.exact["sgd"].shape[1]


def job_file(folder: Path, token_budget: int) -> Path:
    """The job with batches of that many padded tokens."""
    return folder / f"job-{token_budget}.json"


def prepare(folder: Path, n: int, batch_costs: Mapping[int, int | None], dim: int, threads: int) -> Prepared:
    """Write a job per token budget, N examples and a checkpoint to the folder; compute the exact vectors.

    ``batch_costs``: the token budgets, and what a batch of that budget costs beside its tokens (see plan_batches).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens, source = shuffled_tokens(n + WARM_UP_STEPS * WARM_UP_BATCH)
    examples, warm_up = tokens[:n], tokens[n:]
    base = base_model(folder)
    checkpoint = folder / "checkpoint"
    model, state = trained(base, warm_up, checkpoint)
    facts = {"model": str(base), "checkpoint": str(checkpoint), "dim": dim, "threads": threads}
    for budget, cost in batch_costs.items():
        batches = plan_batches([len(ids) for ids, _ in examples], budget, batch_cost=cost)
        job_file(folder, budget).write_text(json.dumps({**facts, "batches": batches}))
    ids, labels = (np.concatenate([example[i] for example in examples]) for i in (0, 1))
    offsets = np.cumsum([0, *(len(example[0]) for example in examples)])
    np.savez(folder / "examples.npz", ids=ids, labels=labels, offsets=offsets)
    return Prepared(folder, source, examples, exact_vectors(model, examples, state))


def shuffled_tokens(n: int) -> tuple[list[Tokens], str]:
    """N examples as (ids, labels), in an order that has nothing to do with their lengths."""
    batches, source = example_batches(n, MAX_LENGTH, MAX_LENGTH, 4096)
    rows = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            length = int(mask.sum())
            rows.append((ids[:length].tolist(), labels[:length].tolist()))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    usable = [rows[i] for i in order if any(label >= 0 for label in rows[i][1][1:])]
    return usable, source


def base_model(folder: Path) -> Path:
    """The folder of the base model: the tiny trained Llama of the test data, else one with random weights."""
    data = data_folder()
    if data is not None:
        return data / "models/tiny-llama-2.4m"
    path = folder / "base"
    llama(192, 4, 6, 3, 512, 4096).save_pretrained(path)  # type: ignore[operator]  # common.llama says nn.Module
    return path


def trained(base: Path, examples: Sequence[Tokens], checkpoint: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """A few steps of AdamW on LoRA weights with random B, saved as the Trainer saves them; the model and Adam's state.

    Two parameter groups, as the Trainer makes them: all LoRA weights decay, and the other group stays empty.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(plain, LoraConfig(r=8, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)
    for step in range(WARM_UP_STEPS):
        optimizer.zero_grad()
        for ids, labels in examples[step * WARM_UP_BATCH : (step + 1) * WARM_UP_BATCH]:
            (own_loss(model, ids, labels) / WARM_UP_BATCH).backward()
        optimizer.step()
    model.save_pretrained(str(checkpoint))
    state = optimizer.state_dict()
    torch.save(state, checkpoint / "optimizer.pt")
    return model, state


def own_loss(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    """The mean loss of one example, alone in its batch."""
    return model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss


def exact_vectors(
    model: nn.Module, examples: Sequence[Tokens], state: Mapping[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """Every example's gradient by autograd, one at a time in float64, and what each rule of Adam makes of it."""
    model = model.double()
    weights = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(own_loss(model, ids, labels), weights)])
        for ids, labels in examples
    ]
    g = torch.stack(rows)
    saved = [state["state"][i] for i in range(len(weights))]
    m, v = (torch.cat([entry[key].flatten() for entry in saved]).double() for key in ("exp_avg", "exp_avg_sq"))
    step = int(saved[0]["step"]) + 1
    first, second = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
    rules = {
        "sgd": g,
        "less": first / (second + 1e-8).sqrt(),
        "torch": first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8),
        "second": g / (v.sqrt() + 1e-8),
    }
    return {rule: vectors.numpy() for rule, vectors in rules.items()}
