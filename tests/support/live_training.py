"""An optimizer in the middle of training, and the features that its state gives, in float64 by plain autograd."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from less_fast.layout import ParameterLayout
from less_fast.projection import Projection
from support.models import gradients
from support.oracle import matrix

BETAS, EPS = (0.8, 0.99), 1e-7


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """An AdamW over the trainable parameters, with constants that are nobody's defaults."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=BETAS, eps=EPS)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> None:
    """One update on a batch."""
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def exact_features(
    model: nn.Module,
    layout: ParameterLayout,
    batch: Mapping[str, Tensor],
    projection: Projection,
    state: Mapping[str, tuple[Tensor, Tensor, int]] | None = None,
    rule: str = "less",
) -> np.ndarray:
    """(N, K) float64: Pi · u(g) with the explicit matrix; ``state``: name -> (m, v, steps), None for u(g) = g."""
    grads = gradients(model, [p.name for p in layout.parameters], batch).numpy()
    return exact_updates(grads, layout, state, rule) @ matrix(projection, layout).T


def exact_updates(
    grads: np.ndarray, layout: ParameterLayout, state: Mapping[str, tuple[Tensor, Tensor, int]] | None, rule: str
) -> np.ndarray:
    """(N, P) float64: u(g), written from the two rules' definitions."""
    if state is None:
        return grads
    parts = []
    for p in layout.parameters:
        m, v, steps = state[p.name]
        m, v = (moment.double().flatten().numpy() for moment in (m, v))
        g = grads[:, p.offset : p.offset + p.size]
        if rule == "less":
            parts.append((0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8))
        else:
            (b1, b2), t = BETAS, steps + 1
            m_hat = (b1 * m + (1 - b1) * g) / (1 - b1**t)
            v_hat = (b2 * v + (1 - b2) * g**2) / (1 - b2**t)
            parts.append(m_hat / (np.sqrt(v_hat) + EPS))
    return np.concatenate(parts, 1)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Name -> (m, v, steps) of what the optimizer holds, copied."""
    return {
        name: (entry["exp_avg"].clone(), entry["exp_avg_sq"].clone(), int(entry["step"]))
        for name, p in model.named_parameters()
        if (entry := optimizer.state.get(p))
    }


def close(found: np.ndarray, exact: np.ndarray, relative: float = 1e-5) -> bool:
    """Whether the difference's norm is within ``relative`` of the exact values' norm, row by row."""
    return bool((np.linalg.norm(found - exact, axis=1) <= relative * np.linalg.norm(exact, axis=1)).all())
