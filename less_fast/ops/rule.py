"""``Rule``: the element-wise map from a gradient to the optimizer's update, in the one form every kernel computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

CODES = {"none": 0, "sign": 1, "adam": 2}


@dataclass(frozen=True)
class Rule:
    """u = g (``none``), sign(g) (``sign``), or (a + alpha·g) / (sqrt(b + gamma·g²) + e) (``adam``).

    ``a`` and ``b`` are (S, L) tables of one parameter, short side first. Both published Adam rules have this form:
    ``less`` with a = β1·m, alpha = 1−β1, b = β2·v + eps, gamma = 1−β2, e = 0; ``torch`` with every moment divided by
    its bias correction and e = eps.
    """

    kind: str = "none"
    a: Tensor | None = field(default=None, repr=False)
    b: Tensor | None = field(default=None, repr=False)
    alpha: float = 1.0
    gamma: float = 0.0
    e: float = 0.0

    @property
    def code(self) -> int:
        """The number that compiled kernels know the kind by."""
        return CODES[self.kind]

    def columns(self, start: int, stop: int) -> Rule:
        """The rule of columns [start, stop) of the long side."""
        if self.a is None or self.b is None:
            return self
        a, b = self.a[:, start:stop].contiguous(), self.b[:, start:stop].contiguous()
        return Rule(self.kind, a, b, self.alpha, self.gamma, self.e)

    def reference(self, grads: Tensor) -> Tensor:
        """The definition: (..., S, L) of any floating dtype -> the same shape and dtype."""
        if self.kind == "none":
            return grads
        if self.kind == "sign":
            return torch.sign(grads) + (grads - grads)  # the difference is NaN where g is not finite, else 0
        assert self.a is not None and self.b is not None
        a, b = self.a.to(grads), self.b.to(grads)
        return (a + self.alpha * grads) / (torch.sqrt(b + self.gamma * grads.square()) + self.e)


NONE = Rule()
