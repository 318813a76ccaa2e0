"""Load what ``--model_path`` names as LESS does: with ``<pad>``, a resized embedding, and the adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from less_fast.errors import LessFastError
from less_fast.model.load import load_tokenizer, pick_device
from less_fast.model.lora import LoraSettings, add_adapter, target_modules
from less_fast.model.sites import embedding_rows

_PAD = "<pad>"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_less_model(
    model_path: str | Path, *, dtype: str = "bfloat16", device: str = "auto", lora: LoraSettings | None = None
) -> tuple[nn.Module, Any]:
    """The model in eval mode, its LoRA weights (alone) requiring gradients, and the tokenizer.

    Parameters
    ----------
    model_path : a model, or a PEFT adapter whose configuration names its base model.
    dtype : float32 or bfloat16, of all weights, the adapter's too.
    lora : a new adapter to put on the model: random A (from seed 0), zero B.

    A tokenizer without padding token gets ``<pad>``. The embedding gets a row for every token, and as many rows as the
    adapter's checkpoint has where that holds the embedding. Rows that no file has are drawn from seed 0, as the model's
    own weights are at first. Raises LessFastError where something is missing or does not fit.
    """
    if dtype not in _DTYPES:
        raise LessFastError(f"torch_dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    place = pick_device(device)
    path = Path(model_path)
    adapter = path if (path / "adapter_config.json").exists() else None
    if adapter and lora:
        raise LessFastError(f"{path}: is an adapter already; --initialize_lora is for a model without one")
    base_path = _base_of(adapter) if adapter else str(model_path)
    has_tokenizer = not adapter or (adapter / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(model_path if has_tokenizer else base_path)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": _PAD})
    model = _load_base(base_path, _DTYPES[dtype])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if adapter:
            weights = _adapter_weights(adapter)
            rows = _saved_embedding_rows(model, weights) or max(len(tokenizer), embedding_rows(model) or 0)
            _resize(model, rows)
            model = _with_adapter(model, adapter, base_path)
        _resize(model, max(len(tokenizer), embedding_rows(model) or 0))
        if lora:
            targets = target_modules(model, lora.target_modules, model_path)
            model = add_adapter(model, lora, targets, model_path)
    for name, parameter in model.named_parameters():
        is_lora = "lora_" in name
        parameter.requires_grad_(is_lora)
        if is_lora:  # PEFT makes a new adapter in float32
            parameter.data = parameter.data.to(_DTYPES[dtype])
    return model.eval().to(place), tokenizer


def _load_base(path: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise LessFastError(f"{path}: no causal language model could be loaded ({_first_line(error)})") from error


def _base_of(adapter: Path) -> str:
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    except (OSError, ValueError, TypeError) as error:
        raise LessFastError(f"{adapter}: not a readable adapter configuration ({_first_line(error)})") from error
    if not base:
        raise LessFastError(f"{adapter}: adapter_config.json names no base model; write its path there")
    return base


def _adapter_weights(adapter: Path) -> dict[str, torch.Tensor]:
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        return load_peft_weights(str(adapter), device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise LessFastError(f"{adapter}: the adapter's weights cannot be read ({_first_line(error)})") from error


def _saved_embedding_rows(model: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """Rows of the embedding in an adapter's checkpoint; None where it holds none."""
    embedding = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters() if parameter is embedding]
    saved = [value.shape[0] for key, value in weights.items() if any(key.endswith(f".{name}") for name in names)]
    return saved[0] if saved else None


def _resize(model: Any, rows: int) -> None:
    """Give the embedding (and the head) this many rows; what is there stays."""
    if rows != embedding_rows(model):
        base = getattr(model, "get_base_model", lambda: model)()
        base.resize_token_embeddings(rows, mean_resizing=False)


def _with_adapter(model: Any, adapter: Path, base_path: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise LessFastError(f"{adapter}: the adapter does not fit {base_path} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
