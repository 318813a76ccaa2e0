"""Packed batches: all examples' tokens in one row, no padding; attention is told where each example begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.model.capture import frozen_eval
from less_fast.model.devices import main_device
from less_fast.model.sites import embedding_rows
from less_fast.model.varlen import attend_each, refuses, varlen_kernel
from less_fast.segments import Segments
from less_fast.transfer import to_device

Packing = Literal["auto", "always", "never"]
# Its name among transformers' attention implementations. It has no mask function there: transformers makes no mask.
NAME = "less_fast_segments"
# What attends where no kernel takes all examples at once.
EXAMPLE_BY_EXAMPLE = "scaled_dot_product_attention"
# Layers that attend as this implementation does; others (chunked, linear, convolutions) need the model's own code.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Tensors that attention may be handed and need not look at.
_UNUSED = {"position_ids", "cache_position", "position_embeddings"}
_PROBE = (3, 5)  # tokens of the two examples


@dataclass
class Attention:
    """What the attention of the current forward pass goes by, and what it has seen."""

    segments: Segments
    boundaries: Tensor
    calls: int = 0
    windows: int = 0
    kernels: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Layout:
    """How batches are laid out. ``own_attention``: whether they are attended to by this file, not by the model's code.

    ``attention``: the name of what attends in a packed batch.
    """

    packed: bool
    own_attention: bool
    attention: str | None = None

    @property
    def name(self) -> str:
        """``padded``, or ``packed`` with what attends."""
        return f"packed, {self.attention}" if self.packed else "padded"


_current: ContextVar[Attention | None] = ContextVar("less_fast_attention", default=None)


def choose_layout(model: nn.Module, device: torch.device, packing: Packing) -> Layout:
    """``auto`` packs where a variable-length kernel takes the model's attention; ``always`` wherever results are equal.

    Raises LessFastError, with the reason, where ``always`` is asked of a model that :func:`supports_packing` refuses.
    """
    if packing not in get_args(Packing):
        raise LessFastError(f"packing is {packing!r}; expected one of {', '.join(get_args(Packing))}")
    if packing == "never" or (packing == "auto" and device.type != "cuda"):
        return Layout(packed=False, own_attention=False)
    found = _probe(model)
    if isinstance(found, str):
        if packing == "always":
            raise LessFastError(f"the batches cannot be packed: {found}; use packing='auto' or 'never'")
        return Layout(packed=False, own_attention=False)
    attention = " and ".join(sorted(found.kernels))
    if packing == "always" or attention != EXAMPLE_BY_EXAMPLE:
        return Layout(packed=True, own_attention=True, attention=attention)
    # On CUDA even a padded batch gains: transformers' search for packed examples makes the host wait for the device.
    return Layout(packed=False, own_attention=True)


def supports_packing(model: nn.Module) -> str | None:
    """None where packed batches give what padded ones do, else the reason why not; runs the model on 8 tokens."""
    found = _probe(model)
    return found if isinstance(found, str) else None


@contextmanager
def attending(model: nn.Module, segments: Segments) -> Iterator[Attention]:
    """Within the context the model's attention sees the tokens of one segment only; its implementation is put back."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    total = sum(segments.lengths)
    filled = [start for start, length in zip(segments.starts, segments.lengths) if length]
    device = segments.table.device
    boundaries = to_device(torch.tensor([*filled, total], dtype=torch.int32), device)
    attention = Attention(segments, boundaries)
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    token = _current.set(attention)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield attention
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation_internal = name
        _current.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: query (rows, H, T, D), key, value (rows, H', T, D) -> (rows, T, H, D)."""
    attention = _current.get()
    if attention is None:
        raise LessFastError(f"attention {NAME!r} works only in the passes that less_fast runs; set another one")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    tensors = sorted(name for name, x in others.items() if isinstance(x, Tensor) and name not in _UNUSED)
    for reason, holds in (
        ("uses a mask of its own", attention_mask is not None),
        ("caps its scores (softcap)", bool(others.get("softcap"))),
        ("is not causal", not causal),
        ("uses dropout", dropout > 0),
        (f"uses {', '.join(tensors)}", bool(tensors)),
    ):
        if holds:
            raise LessFastError(f"the attention of {type(module).__name__} {reason}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = varlen_kernel() if attention.segments.row_length is None else None
    attention.calls += 1
    attention.windows += sliding_window is not None
    if kernel is None or refuses(kernel, query, value, sliding_window) is not None:
        attention.kernels.add(EXAMPLE_BY_EXAMPLE)
        return attend_each(query, key, value, attention.segments, sliding_window, scale), None
    attention.kernels.add(kernel.name)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(attention.segments.lengths)
    boundaries = attention.boundaries.to(query.device)
    return kernel.attend(q, k, v, boundaries, longest, sliding_window, scale)[None], None


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model that names an attention implementation, once."""
    found = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def _probe(model: nn.Module) -> Attention | str:
    """What attended to two packed examples, of which the second came out as it does alone; or what is in the way."""
    if not _configs(model):
        return f"{type(model).__name__} has no exchangeable attention; it is no model of transformers"
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    types = getattr(config, "layer_types", None) or []
    if unknown := sorted(set(types) - _LAYER_TYPES):
        return f"the model has layers of type {', '.join(unknown)}"
    first, total = _PROBE[0], sum(_PROBE)
    parameter = next(model.parameters())
    place = main_device(model)
    ids = torch.arange(1, total + 1, device=place)[None] % (embedding_rows(model) or total + 1)
    positions = torch.cat([torch.arange(length) for length in _PROBE])[None].to(place)
    with frozen_eval(model), torch.no_grad():
        alone = model(input_ids=ids[:, first:], use_cache=False).logits
        try:
            with attending(model, Segments.packed(_PROBE, place)) as seen:
                packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, first:]
            with attending(model, Segments.packed(_PROBE, place)):
                other = torch.cat([ids[:, :first].flip(1), ids[:, first:]], 1)
                beside_others = model(input_ids=other, position_ids=positions, use_cache=False).logits[:, first:]
        except LessFastError as error:
            return str(error)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"{type(model).__name__} does not run on packed tokens ({str(error).strip().partition(chr(10))[0]})"
    layers = getattr(config, "num_hidden_layers", seen.calls)
    if seen.calls != layers:
        return f"{seen.calls} of the model's {layers} layers attend through transformers' attention interface"
    windows = types.count("sliding_attention") if types else layers * bool(getattr(config, "sliding_window", None))
    if seen.windows != windows:
        return f"{seen.windows} of the model's layers tell their sliding window to attention, but {windows} have one"
    largest, single = float(alone.abs().max()), parameter.dtype in (torch.float32, torch.float64)
    # The same operations beside other tokens: no rounding differs. Alone, products of other shapes are rounded.
    if float((packed - beside_others).abs().max()) > (1e-5 if single else 1e-3) * largest:
        return f"tokens of {type(model).__name__} see tokens of other examples"
    if float((packed - alone).abs().max()) > (1e-4 if single else 0.1) * largest:
        return f"the positions of packed tokens of {type(model).__name__} are ignored"
    return seen
