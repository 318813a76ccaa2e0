"""Which matrices the gradient is taken of: the LoRA weights of an adapter, or Linears chosen by a name pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.model.quantized import refuse_outliers

# Parameters that PEFT's LoRA family adds and whose per-example gradients are not outer products of a Linear.
_UNSUPPORTED = {
    "lora_embedding_A": "an adapter on an embedding",
    "lora_embedding_B": "an adapter on an embedding",
    "lora_magnitude_vector": "a DoRA magnitude",
    "modules_to_save": "a fully trained copy of a module (modules_to_save)",
    "trainable_tokens": "trainable tokens",
}


@dataclass(frozen=True)
class Site:
    """One captured matrix: ``module`` is a Linear (or GPT-2's Conv1D) whose ``weight`` is ``layout.parameters[index]``.

    ``short_is_output``: whether the short side S of the weight runs along the module's output (then the output
    gradient is the left factor of the outer product) or along its input.
    """

    index: int
    name: str
    module: nn.Module
    short_is_output: bool


def find_sites(model: nn.Module, targets: str | None = None) -> tuple[list[Site], ParameterLayout]:
    """The captured matrices of a model and their layout, both in ``named_parameters()`` order.

    Parameters
    ----------
    targets : a regular expression searched in module names: the weights of the Linears it finds are taken (biases
        are not). None: every LoRA matrix of the model's active adapters.

    Raises
    ------
    LessFastError
        naming the parameter or module, where nothing is found or something found is not supported.
    """
    _refuse_model(model)
    try:
        pattern = re.compile(targets or "")
    except re.error as error:
        raise LessFastError(f"targets {targets!r} is no regular expression ({error})") from None
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: list[tuple[str, Any]] = []
    # Duplicates stay in: a tied weight has to be refused under the name it was asked for by.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if targets is None:
            if _is_adapter_weight(name, module, parameter) and _is_active(modules, owner):
                chosen.append((name, module))
        elif leaf == "weight" and pattern.search(owner):
            if not isinstance(module, (nn.Linear, Conv1D)):
                if parameter.ndim == 2:
                    raise LessFastError(
                        f"target {owner} is a {type(module).__name__}; only Linear layers are supported"
                    )
                continue
            if not parameter.is_floating_point():
                raise LessFastError(f"target {owner} has a quantised weight ({parameter.dtype}); put an adapter on it")
            chosen.append((name, module))
    if not chosen:
        if targets is None:
            raise LessFastError(
                "the model has no LoRA weights; load or add a PEFT adapter, or name Linear layers by a pattern "
                "(targets in Python, --modules on the command line)"
            )
        raise LessFastError(f"no Linear layer's name matches the pattern {targets!r}")
    _refuse_shared(model, chosen)
    layout = ParameterLayout.build((name, *module.weight.shape) for name, module in chosen)
    sites = [
        # A Linear's weight is (output, input), a Conv1D's is (input, output).
        Site(index, parameter.name, module, parameter.short_is_rows != isinstance(module, Conv1D))
        for index, (parameter, (_, module)) in enumerate(zip(layout.parameters, chosen))
    ]
    return sites, layout


def _refuse_model(model: nn.Module) -> None:
    """Raise LessFastError for encoder-decoders, adapters that train what is not captured, examples that mix."""
    refuse_outliers(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise LessFastError(
            f"the model is an encoder-decoder ({type(model).__name__}); expected a causal language model"
        )
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "bias", "none") != "none":
            raise LessFastError(
                f"adapter {name} trains biases (bias={adapter.bias!r}), whose gradients are not captured; "
                "retrain it with bias='none', or name the Linear layers you want by a pattern (targets, --modules)"
            )


def _is_active(modules: dict[str, nn.Module], owner: str) -> bool:
    """Whether the adapter that a LoRA matrix belongs to is in use; ``owner`` is like ...q_proj.lora_A.default."""
    path, _, adapter = owner.rpartition(".")
    active = getattr(modules[path.rpartition(".")[0]], "active_adapters", None)
    return active is None or adapter in active


def _is_adapter_weight(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    for part, what in _UNSUPPORTED.items():
        if part in name:
            raise LessFastError(
                f"parameter {name} is {what}, which has no per-example outer product; "
                "retrain the adapter without it, or name the Linear layers you want by a pattern (targets, --modules)"
            )
    if "lora_" not in name:
        return False
    if name.endswith(".bias"):
        raise LessFastError(f"parameter {name} is a bias of a LoRA matrix (lora_bias=True), which is not supported")
    if not isinstance(module, nn.Linear):
        raise LessFastError(
            f"parameter {name} belongs to a {type(module).__name__}; LoRA is supported on Linear layers only"
        )
    return True


def _refuse_shared(model: nn.Module, chosen: list[tuple[str, Any]]) -> None:
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for name, module in chosen:
        names = names_of[id(module.weight)]
        if len(names) > 1:
            others = ", ".join(other for other in names if other != name)
            raise LessFastError(f"parameter {name} is shared with {others}; its gradient is not one outer product")


def embedding_rows(model: nn.Module) -> int | None:
    """Number of rows of the input embedding, or None where the model does not say."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    weight = getattr(get_embedding(), "weight", None) if get_embedding is not None else None
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None
