"""The LoRA adapter that warm-up trains: its settings, the layers it goes on, and putting it there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from less_fast.errors import LessFastError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter that is trained; the defaults are LESS's.

    ``target_modules``: names of the linear layers, or "auto": the attention projections ``q_proj``, ``k_proj``,
    ``v_proj``, ``o_proj`` where the model has them, else PEFT's own choice for its architecture (GPT-2: ``c_attn``).
    """

    rank: int = 128
    alpha: int = 512
    dropout: float = 0.1
    target_modules: Literal["auto"] | Sequence[str] = "auto"


def target_modules(model: Any, wanted: Literal["auto"] | Sequence[str], where: str | Path) -> list[str]:
    """The modules that ``LoraSettings.target_modules`` means for this model; LessFastError where there are none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_CHOICE

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if not isinstance(wanted, str):
        if missing := [name for name in wanted if name.rpartition(".")[2] not in names]:
            raise LessFastError(f"{where}: has no module named {', '.join(missing)}; check lora.target_modules")
        return list(wanted)
    if wanted != "auto":
        raise LessFastError(f'lora.target_modules is {wanted!r}; expected "auto" or a list of module names')
    attention = [name for name in _ATTENTION if name in names]
    if {"q_proj", "v_proj"} <= set(attention):
        return attention
    chosen = [name for name in PEFT_CHOICE.get(getattr(model.config, "model_type", ""), ()) if name in names]
    if not chosen:
        raise LessFastError(f"{where}: no known target modules for this architecture; name them in lora.target_modules")
    return chosen


def add_adapter(model: Any, lora: LoraSettings, targets: list[str], where: str | Path) -> nn.Module:
    """The model with a fresh adapter: A random, B zero, all else frozen. Draws from torch's global generator."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    hits = [type(module) for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=Conv1D in hits,
    )
    with warnings.catch_warnings():
        # PEFT still asks transformers for a property by its old name; nothing a user could act on.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise LessFastError(f"{where}: PEFT refuses the adapter ({str(error).splitlines()[0]})") from error
