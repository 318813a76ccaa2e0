"""``ModuleCollector``: per-module features as bergson collects them, from our capture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from less_fast.compat.bergson.matrix import ModuleProjection
from less_fast.data import CPU_BATCH_COST, Encoded, collate, plan_batches
from less_fast.errors import LessFastError
from less_fast.model.capture import frozen_eval, run
from less_fast.model.inputs import Inputs, checked
from less_fast.model.loss import check_causal, check_length_invariant
from less_fast.model.packed import Packing, attending, choose_layout
from less_fast.model.sites import Site, embedding_rows, find_sites
from less_fast.progress import progress_bar
from less_fast.segments import Segments
from less_fast.transfer import to_device

Reduction = Literal["sum", "mean"]
# Takes the rows of a batch in the data set, and {module: (N, size)}; bergson's Builder and Scorer are such.
Sink = Callable[[list[int], dict[str, Tensor]], object]


class ModuleCollector:
    """Examples' gradients, module by module, as ``bergson build`` collects them, from one pass of our capture.

    Activations and output gradients are projected to ``dim`` values a token before they are multiplied, so that G is
    never formed. Modules are named, and their gradients laid out, as bergson does.

    Parameters
    ----------
    model : a Hugging Face causal LM, with a PEFT LoRA adapter or not. Its flags and weights are as before every call.
    projection : None keeps whole gradients, as ``projection_dim=0`` does.
    targets : None for every LoRA matrix, or, of a model without adapter, every Linear of ``model.base_model`` (which
        leaves the output head out); otherwise a regular expression searched in the names within ``model.base_model``.
    loss_reduction : ``sum`` (bergson's default) or ``mean`` of an example's label tokens.
    packing : as for :class:`~less_fast.FeatureExtractor`.

    ``grad_sizes``: gradient entries of each module, in order; bergson's argument of that name.

    Raises LessFastError where the model has nothing to capture, or something unsupported, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: ModuleProjection | None,
        *,
        targets: str | None = None,
        loss_reduction: Reduction = "sum",
        packing: Packing = "auto",
    ) -> None:
        if loss_reduction not in get_args(Reduction):
            raise LessFastError(f"loss_reduction is {loss_reduction!r}; expected {' or '.join(get_args(Reduction))}")
        base: Any = getattr(model, "base_model", model)
        if targets is None and not hasattr(model, "peft_config"):
            names = [
                re.escape(name) for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))
            ]
            targets = f"^(?:{'|'.join(names)})$"
        self.model, self.projection, self.loss_reduction = model, projection, loss_reduction
        self.sites, layout = find_sites(base, targets)
        self.device = next(model.parameters()).device
        self.modules = [site.name.removesuffix(".weight") for site in self.sites]
        sizes = [projection.dim**2 if projection else parameter.size for parameter in layout.parameters]
        self.grad_sizes = dict(zip(self.modules, sizes))
        self._matrices: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        with frozen_eval(model):
            check_causal(model)
        self.batches = choose_layout(model, self.device, packing)
        self._vocabulary = embedding_rows(model)

    @torch.inference_mode(False)
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """{module: float32 (N, size)} in the order of ``grad_sizes``, and the losses, float32 (N,).

        ``batch`` is as for :class:`~less_fast.FeatureExtractor`. Examples without labels have zeros.
        """
        inputs = Inputs.of(checked(batch, self._vocabulary), self.device, packed=self.batches.packed)
        check_length_invariant(self.model, inputs.tokens.lengths)
        n, shape, n_labels = len(inputs.tokens), inputs.input_ids.shape, inputs.labels.target.numel()
        if not n_labels:
            zeros = {name: torch.zeros(n, size, device=self.device) for name, size in self.grad_sizes.items()}
            return zeros, torch.zeros(n, device=self.device)
        # The mean is what is differentiated, and a sum is that many times the mean.
        counts = to_device(inputs.labels.counts.float(), self.device)
        times = counts if self.loss_reduction == "sum" else torch.ones_like(counts)
        found: dict[str, Tensor] = {}

        def receive(site: Site, value: Tensor, gradient: Tensor) -> None:
            # A module behind the label gather sees the examples' label tokens one after the other.
            gathered = value.shape[:2] == gradient.shape[:2] == (1, n_labels)
            if not gathered and not value.shape[:2] == gradient.shape[:2] == shape:
                raise LessFastError(
                    f"the module of {site.name} gets {tuple(value.shape)} and gives {tuple(gradient.shape)}; "
                    f"expected ({shape[0]}, {shape[1]}, width)"
                )
            segments = inputs.predicting if gathered else inputs.tokens
            product = self._product(site, value, gradient, segments)
            found[self.modules[site.index]] = product.mul_(times[:, None])

        with attending(self.model, inputs.tokens) if self.batches.own_attention else nullcontext():
            losses = run(self.model, self.sites, inputs, receive)
        return {name: found[name] for name in self.modules}, losses * times

    def _product(self, site: Site, value: Tensor, gradient: Tensor, segments: Segments) -> Tensor:
        """Every example's L G R^T: (n, T, D_in) and (n, T, D_out) -> (N, dim^2), its sum over tokens in float32."""
        if self.projection is not None:
            left, right = self._pair(site, value, gradient)
            value, gradient = value @ right.T, gradient @ left.T
        if segments.row_length is None:
            value, gradient = (pad_sequence(x[0].split(segments.lengths), batch_first=True) for x in (value, gradient))
        return (gradient.float().mT @ value.float()).flatten(1)

    def _pair(self, site: Site, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        key = site.index, gradient.dtype, gradient.device
        if key not in self._matrices:
            assert self.projection is not None
            name = self.modules[site.index]
            self._matrices[key] = (
                self.projection.matrix(name, "left", gradient.shape[-1], gradient.device, gradient.dtype),
                self.projection.matrix(name, "right", value.shape[-1], value.device, value.dtype),
            )
        return self._matrices[key]

    def collect(self, data: Any, sink: Sink, *, token_budget: int = 2048, progress: bool = True) -> NDArray[np.float32]:
        """Run every example of a ``datasets.Dataset`` and hand each batch to ``sink``; returns the losses (N,).

        Parameters
        ----------
        data : ``input_ids``, and ``labels`` with -100 where there is no loss (default: the ids), a list per row.
        sink : called with (rows, gradients): bergson's ``Builder`` or ``Scorer``, or any function.
        token_budget : tokens of a batch, padding included.

        Raises LessFastError without ``input_ids``, and for a row whose labels are not as many as its ids.
        """
        if "input_ids" not in data.column_names:
            raise LessFastError(f"the data has no column input_ids; it has {', '.join(data.column_names) or 'none'}")
        lengths = [len(tokens) for tokens in data["input_ids"]]
        n_labels = [len(labels) for labels in data["labels"]] if "labels" in data.column_names else lengths
        for row, (has, length) in enumerate(zip(n_labels, lengths)):
            if has != length:
                raise LessFastError(f"row {row} of the data has {has} labels; expected {length}, one per input id")
        losses = np.zeros(len(lengths), np.float32)
        batches = plan_batches(
            lengths,
            token_budget,
            packed=self.batches.packed,
            batch_cost=CPU_BATCH_COST if self.device.type == "cpu" else None,
        )
        with progress_bar(len(lengths), unit="ex", desc="gradients", show=progress) as bar:
            for rows in batches:
                columns = data[rows]
                ids = columns["input_ids"]
                encoded = [Encoded(*example, truncated=False) for example in zip(ids, columns.get("labels", ids))]
                gradients, found = self(collate(encoded, pad_id=0))
                sink(rows, gradients)
                losses[rows] = found.cpu().numpy()
                bar.update(len(rows))
        return losses
