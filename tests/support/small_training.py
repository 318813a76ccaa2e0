"""Small trainings whose optimizer states the tests read back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS, BETAS, EPS = 3, (0.9, 0.95), 1e-7


def small_model() -> nn.Module:
    """Matrices, norms and biases whose sizes two processes do not divide, and a matrix that is not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 11, bias=False))
    model[3].weight.requires_grad_(False)
    return model


def small_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the Trainer's two groups."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS)


def small_batch(step: int, rank: int) -> Tensor:
    """Process ``rank``'s examples of a step."""
    return torch.randn(2, 7, generator=torch.Generator().manual_seed(10 * step + rank))


def train_alone() -> dict[str, tuple[Tensor, Tensor]]:
    """The moments by name after the same training in one process: gradients are means over the two processes'."""
    model = small_model()
    optimizer = small_optimizer(model)
    for step in range(STEPS):
        losses = [model(small_batch(step, rank)).square().sum() for rank in range(2)]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    named = {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
    return {name: (entry["exp_avg"], entry["exp_avg_sq"]) for name, entry in named.items()}


def stepped(optimizer: torch.optim.Optimizer, seed: int = 0, steps: int = 2) -> torch.optim.Optimizer:
    """The optimizer after steps on random gradients, so that every parameter's state is its own."""
    torch.manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer
