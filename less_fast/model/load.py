"""Load a causal language model, its tokenizer and its LoRA adapter from local folders (or the hub)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from less_fast.errors import LessFastError
from less_fast.model.devices import execution_device, fetched, whole
from less_fast.model.quantized import quantization_config
from less_fast.model.sites import embedding_rows

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise LessFastError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LessFastError(f"device is {device!r}, but torch finds no CUDA device on this machine; use cpu")
    return chosen


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer saved with a model or an adapter."""
    from transformers import AutoTokenizer

    _require_folder(path)
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise LessFastError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from error


def load_model(
    model_path: str | Path,
    adapter_path: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """A causal LM in eval mode and its tokenizer.

    Parameters
    ----------
    model_path : a folder or hub name of a Hugging Face model, or of a PEFT adapter (its base model is then loaded).
    adapter_path : a PEFT adapter to put on the model.
    dtype : float32, bfloat16 or float16, of the model's and the adapter's weights.
    device : auto, cpu, cuda or cuda:N.
    quantization : ``4bit`` or ``8bit``: the base model's linear layers in that many bits, by bitsandbytes.
    device_map : spreads the base model's layers over all devices, the host and the disk, by accelerate: ``auto``, or
        module name -> device as transformers takes it. Then ``device`` has to be auto.

    Raises
    ------
    LessFastError
        for a folder that is missing or no model, and a tokenizer with more tokens than the embedding has rows.
    """
    if dtype not in _DTYPES:
        raise LessFastError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if device_map is not None and device != "auto":
        raise LessFastError(f"device is {device!r} beside a device_map, which says where layers go; leave one out")
    place = pick_device(device)
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if quantization is not None:
        # A quantised layer is made where it stays.
        options["quantization_config"] = quantization_config(quantization, _DTYPES[dtype])
        options["device_map"] = {"": str(place)}
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    if adapter_path is None and (Path(model_path) / "adapter_config.json").exists():
        adapter_path, model_path = model_path, _base_of(Path(model_path))
    _require_folder(model_path)
    if adapter_path is not None:
        _require_folder(adapter_path)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(str(model_path), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LessFastError(f"{model_path}: no causal language model could be loaded ({_first_line(error)})") from error
    has_own_tokenizer = adapter_path is not None and (Path(adapter_path) / "tokenizer_config.json").exists()
    tokenizer_path = adapter_path if has_own_tokenizer and adapter_path is not None else model_path
    tokenizer = load_tokenizer(tokenizer_path)
    check_vocabulary(model, tokenizer, str(tokenizer_path))
    if adapter_path is not None:
        try:
            model = _with_adapter(model, adapter_path, _DTYPES[dtype])
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise LessFastError(
                f"{adapter_path}: the adapter does not fit {model_path} ({_first_line(error)})"
            ) from error
    model.eval()
    return model if "device_map" in options else model.to(place), tokenizer


def _with_adapter(model: Any, adapter_path: str | Path, dtype: torch.dtype) -> nn.Module:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    # Where it is there, PEFT spreads an offloaded model anew, and its own way. The adapter is small: it stays whole on
    # the devices that compute.
    spread = vars(model).pop("hf_device_map", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*to a meta parameter", category=UserWarning)
        # PEFT's default is float32 whatever the model's dtype, which doubles what adapters' inputs take on a GPU.
        adapted = PeftModel.from_pretrained(model, str(adapter_path), autocast_adapter_dtype=False)
    if spread is None:
        return adapted
    model.hf_device_map = spread
    for layer in adapted.modules():
        base: Any = getattr(layer, "base_layer", None)
        place = None if base is None else execution_device(base)
        for name, child in layer.named_children():
            if name.startswith("lora_"):
                child.to(dtype=dtype)
                if place is not None:  # the weight's own device may be none
                    child.to_empty(device=place)
    set_peft_model_state_dict(adapted, load_peft_weights(str(adapter_path), device="cpu"))
    return adapted


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Within the context transformers shows no progress bar for weights; a run loads the model many times."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_vocabulary(model: nn.Module, tokenizer: Any, where: str) -> None:
    """Raise LessFastError where the tokenizer has ids that the embedding has no row for."""
    rows = embedding_rows(model)
    if rows is not None and len(tokenizer) > rows:
        raise LessFastError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens but the model's embedding has {rows} rows; "
            "use the tokenizer the model was trained with, or resize the embedding before saving the model"
        )


def fingerprint(model: nn.Module) -> dict[str, str]:
    """``model``: the configuration and names, shapes and 64 evenly spaced values of every base weight.

    ``adapter``: every LoRA value, and the scaling of every adapter. A call on every rank of a sharded model.
    """
    base, adapter = hashlib.sha256(), hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if config is not None:
        unrelated = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
        fields = {name: value for name, value in config.to_dict().items() if name not in unrelated}
        base.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            adapter.update(f"{name} {sorted(scaling.items())}".encode())
    for name, parameter in model.state_dict(keep_vars=True).items():
        if not isinstance(parameter, torch.Tensor):
            continue
        is_adapter = "lora_" in name
        flat = whole(fetched(model, name) if parameter.is_meta else parameter.detach()).reshape(-1)
        if not is_adapter and flat.numel() > 64:
            flat = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long().to(flat.device)]
        target = adapter if is_adapter else base
        target.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        target.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"model": base.hexdigest(), "adapter": adapter.hexdigest()}


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise LessFastError(f"{adapter}/adapter_config.json: not a readable adapter configuration ({error})") from error
    if not base:
        raise LessFastError(f"{adapter}: adapter_config.json names no base model; give the base model's path too")
    return str(base)


def _require_folder(path: str | Path) -> None:
    # A hub name has at most one slash and does not start like a path.
    looks_local = str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise LessFastError(f"{path}: no such folder; expected a saved model or adapter")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
