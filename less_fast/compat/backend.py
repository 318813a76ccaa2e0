"""``GradientBackend``: what a front end asks of whoever computes its gradients, and ``LessFastBackend``, our answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.layout import ParameterLayout
from less_fast.model.packed import Packing
from less_fast.ops.accumulate import accumulate
from less_fast.ops.inner_products import inner_products
from less_fast.optim import AdamState
from less_fast.optim.adam import Precondition, precondition_rules
from less_fast.optim.moments import Moments, SavedState, clean_name, constants, make_moments
from less_fast.optim.others import refuse_others
from less_fast.projection import Projection

_SOURCE = Path("live optimizer")
_INPUTS = ("input_ids", "labels", "attention_mask")


@runtime_checkable
class GradientBackend(Protocol):
    """What data attribution and selection need of whoever computes their gradients.

    A feature row is Pi · u(g): the gradient g (P entries, numbered by the layout) of one example's own mean loss,
    preconditioned by u and projected by Pi to K features. The model is the caller's: every call sees its weights as
    they are then, and leaves weights, gradients, training flags and random states as they were.
    """

    def layout(self) -> ParameterLayout:
        """Which gradient entry has which index j in [0, P): names, shapes and offsets of the matrices, in order."""
        ...

    def set_precondition(self, precondition: Precondition) -> None:
        """What u of later calls is: ``"sgd"`` (u(g) = g), ``"sign"``, or an :class:`~less_fast.AdamState`."""
        ...

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Float32 (N, K) of a batch of ``input_ids``, ``labels`` and perhaps ``attention_mask``, int64 (N, T).

        A row does not depend on the rest of the batch. An example without labels has a row of zeros.
        """
        ...

    def project(self, grads: Tensor) -> Tensor:
        """Float32 (N, K) of gradients (N, P) that exist already, in the layout's order: what ``features`` makes."""
        ...

    def scores(self, train: Tensor, targets: Tensor) -> Tensor:
        """Float32 (N, M), free of NaN: the cosine of every training row (N, K) with every target row (M, K).

        -inf in training rows that are not :func:`usable`; an unusable target row is an error.
        """
        ...


class LessFastBackend:
    """:class:`GradientBackend` over less_fast's kernels.

    Parameters are those of :class:`~less_fast.FeatureExtractor`; ``projection`` defaults to srht with 8192 features.
    Features are on the model's device, scores on the CPU. ``engine`` gives losses and label counts as well.

    Raises LessFastError where the model has nothing to capture or something unsupported, and where gradients, rows or
    an optimizer state do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection | None = None,
        precondition: Precondition = "sgd",
        *,
        targets: str | None = None,
        backend: str = "auto",
        packing: Packing = "auto",
    ) -> None:
        output = Output(projection or Projection(), precondition)
        self.engine = MultiFeatureExtractor(model, [output], targets=targets, backend=backend, packing=packing)
        self._projection = output.projection
        self._rules = precondition_rules(precondition, self.engine.layout, self.engine.device)

    def layout(self) -> ParameterLayout:
        """As :meth:`GradientBackend.layout`."""
        return self.engine.layout

    def set_precondition(self, precondition: Precondition) -> None:
        """As :meth:`GradientBackend.set_precondition`; the model is not examined again."""
        if isinstance(precondition, AdamState) and precondition.source == str(_SOURCE):
            for parameter in self.engine.layout.parameters:
                if clean_name(parameter.name) not in precondition.moments:
                    raise LessFastError(
                        f"the live optimizer has no moments of {parameter.name}: it does not train it, or has not yet; "
                        "let it train every captured matrix, use precondition 'sgd' or 'sign', or name others (targets)"
                    )
        self.engine.set_precondition(precondition)
        self._rules = precondition_rules(precondition, self.engine.layout, self.engine.device)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`GradientBackend.features`."""
        return self.engine(batch).features[0]

    def project(self, grads: Tensor) -> Tensor:
        """As :meth:`GradientBackend.project`; gradients of any floating dtype, moved to the model's device."""
        layout = self.engine.layout
        if grads.ndim != 2 or grads.shape[1] != layout.size or not grads.is_floating_point():
            raise LessFastError(
                f"project got {grads.dtype} of shape {tuple(grads.shape)}; expected floating-point (N, {layout.size}), "
                "entries in the order of layout()"
            )
        features = torch.zeros(len(grads), self._projection.dim, device=self.engine.device)
        if not len(grads):
            return features
        bases = layout.run_bases(self._projection.block)
        for parameter, base, rule in zip(layout.parameters, bases, self._rules):
            part = grads[:, parameter.offset : parameter.offset + parameter.size]
            part = part.unflatten(1, (parameter.rows, parameter.cols))
            part = part if parameter.short_is_rows else part.transpose(1, 2)
            part = part.to(features).contiguous()
            accumulate(features, part, parameter, base, self._projection, rule, backend=self.engine.backend)
        return features

    def scores(self, train: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`GradientBackend.scores`; a row's bits do not depend on the rows beside it."""
        if train.ndim != 2 or targets.ndim != 2 or train.shape[1] != targets.shape[1]:
            raise LessFastError(
                f"scores got {tuple(train.shape)} and {tuple(targets.shape)}; expected (N, K) and (M, K) of one K"
            )
        if not bool((good := usable(targets)).all()):
            raise LessFastError(
                f"target row {int((~good).nonzero()[0])} of {len(targets)} is zero or not finite; "
                "leave out what usable(targets) is False for"
            )
        valid = usable(train).cpu().numpy()
        queries = _unit(targets)
        rows = np.ascontiguousarray(_scaled(train, valid).astype(np.float32, copy=False))
        norms = np.sqrt(np.einsum("nk,nk->n", rows, rows, dtype=np.float64))
        factor = np.divide(1.0, norms, out=np.zeros_like(norms), where=valid).astype(np.float32)
        found = np.empty((len(rows), len(queries)), np.float32)
        inner_products(rows, "float32", rows.shape[1], queries, factor, found)
        found[~valid] = -np.inf
        return torch.from_numpy(found)


def usable(features: Tensor) -> Tensor:
    """Bool (N,): which rows (N, K) have a direction. Rows of examples without labels, or not finite, have none."""
    return features.isfinite().all(1) & (features != 0).any(1)


def model_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What features are made of, out of a data collator's batch; what the model does not read is left out.

    Raises LessFastError naming what the model would read and features are made without, as ``position_ids``.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    read = {"position_ids", *inspect.signature(base.forward).parameters}.difference(_INPUTS)
    if others := sorted(read.intersection(batch)):
        raise LessFastError(
            f"the batch has {', '.join(others)}, which gradient features are made without; expected input_ids, labels "
            "and attention_mask; use a data collator that makes no more than these"
        )
    return {name: batch[name] for name in _INPUTS if name in batch}


def _scaled(features: Tensor, valid: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows times powers of two, largest magnitudes near 1, so that no square or float32 overflows; others zeros.

    In float64 where the rows are, else in float32.
    """
    features = features.detach().cpu()
    rows = (features if features.dtype == torch.float64 else features.float()).numpy()
    rows = rows if valid.all() else np.where(valid[:, None], rows, rows.dtype.type(0))
    _, exponents = np.frexp(np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0)))
    # A power of two that is itself a normal number: the very smallest rows stay below 1, but far from underflow.
    limits = np.finfo(rows.dtype)
    powers = np.ldexp(rows.dtype.type(1), np.clip(-exponents, limits.minexp, limits.maxexp - 1))
    return rows * powers[:, None]


def _unit(features: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    wide = _scaled(features, np.ones(len(features), bool)).astype(np.float64)
    return np.ascontiguousarray((wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32))


def adam_state(
    optimizer: Any, model: nn.Module, rule: str = "less", *, copy: bool = True, allow_empty: bool = False
) -> AdamState:
    """The state of an optimizer that is training the model, as it is now.

    Parameters
    ----------
    optimizer : a ``torch.optim`` or bitsandbytes Adam or AdamW, a wrapper with its ``state`` and ``param_groups``, or
        that ``state`` itself (parameter -> its entry).
    rule : ``less``, with LESS's constants, or ``torch``, with those of the optimizer's groups.
    copy : into memory of the CPU. Else moments are the optimizer's own where they can be, and change with its steps.
    allow_empty : moments of what the optimizer is to train, but has made no step on yet, are zeros.

    Raises
    ------
    LessFastError
        naming what is wrong, where the state is empty, of another model, or not Adam's.
    """
    state, groups = getattr(optimizer, "state", optimizer), list(getattr(optimizer, "param_groups", ()))
    if not isinstance(state, Mapping):
        raise LessFastError(f"the optimizer is a {type(optimizer).__name__}; expected one of torch.optim, or its state")
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    # Not state[parameter]: the state of torch's optimizers is a defaultdict, and reading must not add to it.
    entries = {name: entry for name, parameter in parameters.items() if (entry := state.get(parameter))}
    refuse_others(SavedState(_SOURCE, _SOURCE, entries, groups))
    moments = {
        name: make_moments(_SOURCE, name, entry, parameters[name].shape, copy) for name, entry in entries.items()
    }
    if allow_empty and all("betas" in group for group in groups) and (entries or not state):
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        moments |= {n: _zeros(p) for n, p in parameters.items() if id(p) in trained and n not in moments}
    if not moments:
        raise LessFastError(
            f"the optimizer's state is {'of none of the model parameters' if state else 'empty'}; expected Adam's "
            "moments of the model's trained parameters; ask after its first step, with the model that it trains"
        )
    if copy:
        moments = {name: Moments(m.cpu(), v.cpu(), step) for name, (m, v, step) in moments.items()}
    return AdamState(moments, rule, source=str(_SOURCE), **(_constants(groups) if rule == "torch" else {}))


def _zeros(parameter: Tensor) -> Moments:
    zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    return Moments(zeros, zeros, 0)


def _constants(groups: list[dict[str, Any]]) -> dict[str, float]:
    found = constants(groups)
    for name, values in found.items():
        if len(values) != 1:
            raise LessFastError(
                f"the optimizer has {'several values of' if values else 'no'} {name} in its groups; rule 'torch' needs "
                "one; pass the optimizer itself, or use rule 'less'"
            )
    return {name: values.pop() for name, values in found.items()}
