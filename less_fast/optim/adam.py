"""Adam's update for one example's gradient, in the two published rules, from a saved optimizer state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.layout import Parameter, ParameterLayout
from less_fast.ops.rule import NONE, Rule
from less_fast.optim.checkpoint import read_moments
from less_fast.optim.moments import Moments, clean_name

RULES = ("less", "torch")


@dataclass(frozen=True)
class AdamState:
    """Adam's moments of every trained parameter and the rule that turns a gradient g into an update u.

    ``less``: u = (β1·m + (1−β1)·g) / sqrt(β2·v + (1−β2)·g² + eps). eps stands inside the root and nothing is
    bias-corrected, as in the code published with LESS (Xia et al. 2024).

    ``torch``: u = m̂ / (sqrt(v̂) + eps), where m̂ and v̂ are the moments after a step on g, corrected for bias at
    step + 1, as ``torch.optim.Adam`` does (Kingma and Ba 2015, algorithm 1).

    ``moments``: parameter name -> (m, v, step); m and v have the parameter's shape, in float32.
    """

    moments: Mapping[str, Moments] = field(repr=False)
    rule: str = "less"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    source: str = "memory"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise LessFastError(f"Adam rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps >= 0):
            raise LessFastError(
                f"Adam has betas ({self.beta1}, {self.beta2}) and eps {self.eps}; expected betas in [0, 1) and eps >= 0"
            )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        model: nn.Module,
        rule: str = "less",
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
    ) -> AdamState:
        """Read the optimizer state of a checkpoint (``path``: its folder, or the file or folder of the state itself).

        Read are ``optimizer.pt`` of the Trainer, ``optimizer.bin`` of FSDP, torch.distributed.checkpoint folders,
        DeepSpeed's ``global_step*``, each of torch's, Apex's or DeepSpeed's Adam, and bitsandbytes' in 8 or 32 bits.
        No code in a file is run. Files are mapped where they can be, and only the model's parameters kept in memory.

        Parameters
        ----------
        model : the model that was trained; integer-keyed states are aligned with its parameters by order and shape.
        rule : ``less`` or ``torch``.
        beta1, beta2, eps : None takes LESS's constants 0.9, 0.999, 1e-8 for rule ``less``, and the values saved in
            the state for rule ``torch``, for which groups of different values need one given here.

        Raises
        ------
        LessFastError
            naming file and parameter, where the state is not whole, does not fit the model, can be aligned with it in
            several ways, or is no Adam state.
        """
        moments, saved = read_moments(Path(path), model)
        given = {"beta1": beta1, "beta2": beta2, "eps": eps}
        constants = {name: value for name, value in given.items() if value is not None}
        for name, default in (("beta1", 0.9), ("beta2", 0.999), ("eps", 1e-8)):
            if name in constants:
                continue
            if rule == "torch" and len(saved[name]) != 1:
                found = f"several values of {name} ({', '.join(map(str, sorted(saved[name])))})"
                raise LessFastError(
                    f"{path}: the optimizer state has {found if saved[name] else f'no {name}'}; rule 'torch' needs "
                    f"one; give {name}="
                )
            constants[name] = min(saved[name]) if rule == "torch" else default
        return cls(moments, rule, source=str(path), **constants)

    def rules(self, layout: ParameterLayout, device: torch.device) -> list[Rule]:
        """One :class:`~less_fast.ops.rule.Rule` per parameter of the layout, tables on ``device``.

        Raises LessFastError naming the parameter that the state lacks or holds in another shape.
        """
        return [self._rule_of(parameter, device) for parameter in layout.parameters]

    def _rule_of(self, parameter: Parameter, device: torch.device) -> Rule:
        moments = self.moments.get(clean_name(parameter.name))
        if moments is None:
            raise LessFastError(
                f"{self.source}: no optimizer state for {parameter.name}; use the optimizer saved with this adapter"
            )
        if moments.m.shape != (parameter.rows, parameter.cols):
            raise LessFastError(
                f"{self.source}: the optimizer state of {parameter.name} has shape {tuple(moments.m.shape)}, "
                f"the parameter {(parameter.rows, parameter.cols)}; use the optimizer saved with this adapter"
            )
        m, v = (self._short_first(parameter, moment).to(device) for moment in (moments.m, moments.v))
        correction1 = correction2 = 1.0
        inside, outside = self.eps, 0.0
        if self.rule == "torch":
            if moments.step is None:
                raise LessFastError(
                    f"{self.source}: the optimizer state of {parameter.name} has no step, which rule 'torch' needs; "
                    "use rule 'less'"
                )
            step = moments.step + 1
            correction1, correction2 = 1 - self.beta1**step, 1 - self.beta2**step
            inside, outside = 0.0, self.eps
        a = m * (self.beta1 / correction1)
        b = v * (self.beta2 / correction2) + inside
        return Rule("adam", a, b, (1 - self.beta1) / correction1, (1 - self.beta2) / correction2, outside)

    @staticmethod
    def _short_first(parameter: Parameter, moment: Tensor) -> Tensor:
        moment = moment if parameter.short_is_rows else moment.T
        return moment.to(torch.float32).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """The rule and a SHA-256 of the moments, for a store's manifest."""
        digest = hashlib.sha256()
        for name in sorted(self.moments):
            entry = self.moments[name]
            digest.update(f"{name} {entry.step}".encode())
            for moment in (entry.m, entry.v):
                digest.update(moment.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "kind": "adam",
            "rule": self.rule,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "state": digest.hexdigest(),
        }


Precondition = str | AdamState


def precondition_rules(precondition: Precondition, layout: ParameterLayout, device: torch.device) -> list[Rule]:
    """``sgd``, ``sign`` or an AdamState as one Rule per parameter."""
    if isinstance(precondition, AdamState):
        return precondition.rules(layout, device)
    if precondition == "adam":
        raise LessFastError("precondition 'adam' needs an optimizer state: pass AdamState.from_checkpoint(path, model)")
    if precondition not in ("sgd", "sign"):
        raise LessFastError(f"precondition is {precondition!r}; expected 'sgd', 'sign' or an AdamState")
    return [NONE if precondition == "sgd" else Rule("sign")] * len(layout.parameters)


def precondition_facts(precondition: Precondition) -> dict[str, Any]:
    """What a store's manifest says of the preconditioner."""
    return precondition.to_dict() if isinstance(precondition, AdamState) else {"kind": precondition}
