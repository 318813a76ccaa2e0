"""Models that are quantised, offloaded or sharded, and what their features are compared with."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from less_fast import AdamState
from less_fast.optim.checkpoint import Moments
from support.tiny import save_tiny_llama


def save_adapted(folder: Path) -> tuple[Path, Path]:
    """A tiny Llama with its tokenizer, and a LoRA adapter with non-zero B on its attention and MLP."""
    base = save_tiny_llama(folder / "model")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def with_weights_of(plain: nn.Module, quantised: nn.Module) -> nn.Module:
    """The plain model with the values that the quantised one's weights stand for."""
    import bitsandbytes as bnb

    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, scales = (module.state.CB, module.state.SCB)
            if codes is None:
                codes, scales = (module.weight.CB, module.weight.SCB)
            weight = codes.float() * scales.float()[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def adam_state(model: nn.Module) -> AdamState:
    """LESS's rule, with random moments about the size of a tiny model's gradients."""
    generator = torch.Generator().manual_seed(3)
    moments = {
        name: Moments(
            torch.randn(p.shape, generator=generator) * 0.01,
            (torch.rand(p.shape, generator=generator) + 0.01) * 1e-4,
            7,
        )
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    return AdamState(moments, rule="less")


def adam_update(state: AdamState, names: list[str], grads: Tensor) -> Tensor:
    """LESS's rule as published, on the flat float64 gradient."""
    m, v = (torch.cat([getattr(state.moments[n], k).flatten() for n in names]).double() for k in ("m", "v"))
    return (0.9 * m + 0.1 * grads) / torch.sqrt(0.999 * v + 0.001 * grads**2 + 1e-8)


def assert_within_tolerance(found: Tensor, in_dtype: Tensor, exact: Tensor) -> None:
    """At most twice the error that the plain path makes in the same dtype."""
    error, allowed, size = ((x.double()).square().mean().sqrt() for x in (found - exact, in_dtype - exact, exact))
    assert error <= 2 * allowed + 1e-6 * size, (float(error / size), float(allowed / size))


@dataclass
class Live:
    """Bytes of the tensors made in a :func:`live_tensors` context that are alive, and the most there ever were."""

    now: int = 0
    most: int = 0


class _Tracker(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live.now += size
        self.live.most = max(self.live.most, self.live.now)

        def gone() -> None:
            self.known.discard(key)
            self.live.now -= size

        weakref.finalize(storage, gone)


@contextmanager
def live_tensors() -> Iterator[Live]:
    """Counts the bytes of every storage that an operation within the context returns, until it is freed."""
    live = Live()
    gc.collect()
    with _Tracker(live):
        yield live
