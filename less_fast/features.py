"""``FeatureExtractor``: a batch in, the sketched per-example gradients (N, K) out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.model.capture import frozen_eval, run
from less_fast.model.loss import IGNORED, LabelPositions, check_causal, check_length_invariant, right_padded
from less_fast.model.sites import Site, embedding_rows, find_sites
from less_fast.ops.accumulate import accumulate, resolve
from less_fast.ops.outer import outer_products
from less_fast.ops.project import check_identity
from less_fast.ops.reduce import can_reduce, reduce_features
from less_fast.optim.adam import Precondition, precondition_rules
from less_fast.projection import Projection

# Float32 entries of per-example gradients of one matrix that exist at a time, whatever N is.
_BUFFER = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Output:
    """One kind of feature: how the gradient is preconditioned and then projected."""

    projection: Projection
    precondition: Precondition = "sgd"


@dataclass(frozen=True)
class BatchFeatures:
    """``features``: one float32 (N, K) tensor per output. ``losses``: float32 (N,). ``n_labels``: int64 (N,)."""

    features: list[Tensor]
    losses: Tensor
    n_labels: Tensor


class MultiFeatureExtractor:
    """Several outputs (kinds, dims, preconditioners) of the same gradients in one forward and backward pass.

    Where one output's matrix is a fold or prefix of another's with the same preconditioner, only the larger is
    computed. Parameters and errors as for :class:`FeatureExtractor`.
    """

    def __init__(
        self, model: nn.Module, outputs: Sequence[Output], *, targets: str | None = None, backend: str = "auto"
    ) -> None:
        if not outputs:
            raise LessFastError("no outputs were asked for; give at least one projection")
        self.model = model
        self.backend = backend
        self.outputs = list(outputs)
        self.sites, self.layout = find_sites(model, targets)
        self.device = next(model.parameters()).device
        for output in outputs:
            check_identity(output.projection, self.layout.size)
        self._source = [self._computed_by(i) for i in range(len(self.outputs))]
        rules = {
            id(output.precondition): precondition_rules(output.precondition, self.layout, self.device)
            for output in self.outputs
        }
        self._computed = [
            (i, output, rules[id(output.precondition)], self.layout.run_bases(output.projection.block))
            for i, output in enumerate(self.outputs)
            if self._source[i] == i
        ]
        self._buffer = torch.empty(0, device=self.device)
        with frozen_eval(model):
            check_causal(model)
        self._vocabulary = embedding_rows(model)

    def _computed_by(self, i: int) -> int:
        """The output whose features output i is reduced from; itself where there is none."""
        wanted = self.outputs[i]
        for k, other in sorted(enumerate(self.outputs), key=lambda item: -item[1].projection.dim):
            same = other.precondition is wanted.precondition or (
                isinstance(wanted.precondition, str) and other.precondition == wanted.precondition
            )
            if same and can_reduce(other.projection, wanted.projection):
                return k
        return i

    @torch.inference_mode(False)
    def __call__(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        """Features of every output for a batch; see :meth:`FeatureExtractor.__call__`."""
        batch = self._checked(batch)
        n = batch["input_ids"].shape[0]
        labels = LabelPositions.of(batch["labels"])
        check_length_invariant(self.model, batch["lengths"])
        features: list[Tensor | None] = [None] * len(self.outputs)
        for i, output, _, _ in self._computed:
            features[i] = torch.zeros(n, output.projection.dim, device=self.device)
        losses = torch.zeros(n, device=self.device)
        if labels.target.numel():

            def receive(site: Site, value: Tensor, gradient: Tensor) -> None:
                self._receive(site, value, gradient, batch["input_ids"].shape, labels, features)

            losses = run(self.model, self.sites, batch["input_ids"], labels, receive)
            for tensor in features:
                if tensor is not None:  # without a gradient Adam's update would still be that of its momentum
                    tensor[labels.counts == 0] = 0.0
        done = []
        for i, output in enumerate(self.outputs):
            source = features[self._source[i]]
            assert source is not None
            done.append(reduce_features(source, self.outputs[self._source[i]].projection, output.projection))
        return BatchFeatures(done, losses, labels.counts)

    def backends(self) -> list[str]:
        """The backend that computes each output, by name."""
        grads = torch.empty(1, 1, 1, device=self.device)
        return [
            resolve(torch.empty(1, o.projection.dim, device=self.device), grads, o.projection, self.backend)
            for o in self.outputs
        ]

    def computed(self) -> list[Projection]:
        """The projection each output is computed with: another than its own where it is a fold or prefix of that."""
        return [self.outputs[k].projection for k in self._source]

    def _receive(
        self,
        site: Site,
        value: Tensor,
        gradient: Tensor,
        shape: torch.Size,
        labels: LabelPositions,
        features: list[Tensor | None],
    ) -> None:
        parameter = self.layout.parameters[site.index]
        left, right = (gradient, value) if site.short_is_output else (value, gradient)
        n = labels.counts.shape[0]
        lengths = None
        if left.shape[:2] == right.shape[:2] == (1, labels.target.numel()):
            # A module behind the label gather sees the examples' label tokens one after the other.
            lengths = labels.counts.tolist()
        elif not left.shape[:2] == right.shape[:2] == shape:
            raise LessFastError(
                f"the module of {site.name} gets {tuple(value.shape)} and gives {tuple(gradient.shape)}; "
                f"expected {n} examples of {shape[1]} tokens first"
            )
        chunk = max(1, _BUFFER.get(self.device.type, _BUFFER["cpu"]) // parameter.size)
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            grads = self._scratch((stop - start) * parameter.size).view(stop - start, parameter.short, parameter.long)
            outer_products(left, right, start, stop, grads, lengths)
            for i, output, rules, bases in self._computed:
                target = features[i]
                assert target is not None
                accumulate(
                    target[start:stop],
                    grads,
                    parameter,
                    bases[site.index],
                    output.projection,
                    rules[site.index],
                    backend=self.backend,
                )

    def _scratch(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, device=self.device)
        return self._buffer[:size]

    def _checked(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in ("input_ids", "labels"):
            if name not in batch:
                raise LessFastError(f"the batch has no {name!r}; it has {sorted(batch)}")
        if unknown := sorted(set(batch) - {"input_ids", "labels", "attention_mask"}):
            raise LessFastError(
                f"the batch has {', '.join(unknown)}, which would change nothing; "
                "expected input_ids, labels and attention_mask"
            )
        ids, labels = batch["input_ids"], batch["labels"]
        if ids.ndim != 2 or ids.shape != labels.shape:
            raise LessFastError(
                f"input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must have one shape (N, T)"
            )
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise LessFastError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(ids.shape)}")
        if ids.numel() and self._vocabulary is not None:
            for name, tensor in (("input_ids", ids), ("labels", torch.where(labels == IGNORED, 0, labels))):
                low, high = int(tensor.min()), int(tensor.max())
                if low < 0 or high >= self._vocabulary:
                    raise LessFastError(
                        f"{name} hold token {low if low < 0 else high}, but the model's embedding has "
                        f"{self._vocabulary} rows; use the model's own tokenizer"
                    )
        tensors = {"input_ids": ids, "labels": labels}
        if mask is not None:
            tensors["attention_mask"] = mask
        return right_padded({name: tensor.to(self.device) for name, tensor in tensors.items()})


class FeatureExtractor:
    """Gradient features of one kind: per-example gradient, preconditioned, projected.

    Parameters
    ----------
    model : a Hugging Face causal LM, with a PEFT LoRA adapter or not. Its training flags, ``requires_grad`` flags and
        weights are as they were after every call.
    projection : the sketch.
    precondition : ``"sgd"`` (the raw gradient), ``"sign"``, or an :class:`AdamState`.
    targets : None for every LoRA matrix, or a regular expression searched in the names of Linear modules.
    backend : ``auto``, ``reference``, ``cpu`` or ``triton``.

    Raises
    ------
    LessFastError
        where the model has nothing to capture, something unsupported (by name), or the optimizer state does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        precondition: Precondition = "sgd",
        *,
        targets: str | None = None,
        backend: str = "auto",
    ) -> None:
        self._engine = MultiFeatureExtractor(
            model, [Output(projection, precondition)], targets=targets, backend=backend
        )
        self.layout = self._engine.layout

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features of a batch.

        Parameters
        ----------
        batch : ``input_ids`` and ``labels`` (N, T) int64, labels -100 where masked; ``attention_mask`` (N, T) where
            rows are padded (on either side).

        Returns
        -------
        float32 (N, K): row n is Pi · u(g_n), g_n being the gradient of the mean cross-entropy of example n over its own
        label tokens, whatever else is in the batch. A row without labels is zero.
        """
        return self._engine(batch).features[0]
