"""Base weights in 4 or 8 bits (bitsandbytes): what keeps gradients through them whole, and of one example each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from less_fast.errors import LessFastError

_QUANTIZATIONS = ("4bit", "8bit")


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """The ``BitsAndBytesConfig`` of transformers; LessFastError where bitsandbytes is missing or the name is unknown.

    ``4bit``: NF4 with quantised constants, as in QLoRA (Dettmers et al. 2023); products are computed in ``dtype``.
    ``8bit``: LLM.int8() without its outlier columns, see :func:`refuse_outliers`.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if quantization not in _QUANTIZATIONS:
        raise LessFastError(f"quantization is {quantization!r}; expected one of {', '.join(_QUANTIZATIONS)}")
    if not is_bitsandbytes_available():
        raise LessFastError(f"quantization is {quantization!r}, which needs bitsandbytes: pip install bitsandbytes")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def refuse_outliers(model: nn.Module) -> None:
    """Raise LessFastError for 8-bit layers that treat a column of activations by its largest value in the batch.

    An example's features would then depend on its neighbours.
    """
    for module in _of_type(model.modules(), "Linear8bitLt"):
        if module.state.threshold > 0:
            name = next(name for name, other in model.named_modules() if other is module)
            raise LessFastError(
                f"{name} is an 8-bit layer with outlier threshold {module.state.threshold:g}, which makes an example's "
                "features depend on the others of its batch; load the model with quantization='8bit' "
                "(llm_int8_threshold=0.0), or in 4 bits"
            )


@contextmanager
def differentiable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context 4-bit layers on a CPU keep the form that has a gradient.

    In eval mode, on CPUs with AVX512-BF16, bitsandbytes replaces it for good by one that has none and is rounded.
    Raises LessFastError where it already has.
    """
    tempted = []
    for module in _of_type(modules, "Linear4bit"):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise LessFastError(
                f"a 4-bit weight of shape {tuple(module.weight.quant_state.shape)} was repacked by a forward pass "
                "without gradients on the CPU and has none any more; load the model again, and run it for features "
                "before anything else"
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            tempted.append(module)
    for module in tempted:
        module.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for module in tempted:
            module.support_avx512bf16_for_cpu = True


def _of_type(modules: Iterable[nn.Module], kind: str) -> list[Any]:
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # then the model has none of its layers
        return []
    of_type = getattr(bitsandbytes.nn, kind)
    return [module for module in modules if isinstance(module, of_type)]
