"""``FeatureExtractor``: a batch in, the sketched per-example gradients (N, K) out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from less_fast.data import CPU_BATCH_COST
from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.model.capture import Receiver, frozen_eval, run
from less_fast.model.checkpointed import checkpointable, checkpointed
from less_fast.model.devices import is_sharded, main_device, recorded_devices
from less_fast.model.inputs import Inputs, checked
from less_fast.model.loss import check_causal, check_length_invariant
from less_fast.model.packed import Packing, attending, choose_layout
from less_fast.model.sites import Site, embedding_rows, find_sites
from less_fast.ops.accumulate import resolve
from less_fast.ops.fused import Prepared
from less_fast.ops.outer import Scratch
from less_fast.ops.outer_sketch import Target, lanes_needed, outer_sketches, prepare, sum_lanes
from less_fast.ops.project import check_identity
from less_fast.ops.reduce import can_reduce, reduce_features
from less_fast.ops.rule import Rule
from less_fast.optim.adam import Precondition, precondition_rules
from less_fast.projection import Projection
from less_fast.segments import Segments
from less_fast.transfer import to_device

_MOST_FEATURE_BYTES = 2 << 30
# Tokens that could be computed while the whole of a dense matrix is generated, as it is for every batch: P · K entries,
# where an adapter's P is some 2 % of the model's.
_DENSE_BATCH_COST = {"rademacher": 320, "gaussian": 2048}


@dataclass(frozen=True)
class Output:
    """One kind of feature: how the gradient is preconditioned and then projected."""

    projection: Projection
    precondition: Precondition = "sgd"


@dataclass(frozen=True)
class BatchFeatures:
    """``features``: one float32 (N, K) tensor per output. ``losses``: float32 (N,). ``n_labels``: int64 (N,).

    Features and losses are on the device that takes the model's inputs and may still be in the making there;
    ``n_labels`` is on the host.
    """

    features: list[Tensor]
    losses: Tensor
    n_labels: Tensor


@dataclass(frozen=True)
class _Computed:
    """An output that is not reduced from another: its ``lanes`` by device, (run base, rule, prepared) of every site.

    What belongs to a site is on the device where its module computes.
    """

    index: int
    projection: Projection
    lanes: dict[torch.device, int]
    sites: list[tuple[int, Rule, Prepared]]


@dataclass(frozen=True)
class _Place:
    """What a batch has on one device: partial features of every computed output, and where examples' tokens are."""

    lanes: list[Tensor]
    tokens: Segments
    predicting: Segments


class MultiFeatureExtractor:
    """Several outputs (kinds, dims, preconditioners) of the same gradients in one forward and backward pass.

    Where one output's matrix is a fold or prefix of another's with the same preconditioner, only the larger is
    computed. Parameters and errors as for :class:`FeatureExtractor`.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Sequence[Output],
        *,
        targets: str | None = None,
        backend: str = "auto",
        packing: Packing = "auto",
        checkpoint_activations: bool = False,
    ) -> None:
        if not outputs:
            raise LessFastError("no outputs were asked for; give at least one projection")
        self.model = model
        self.backend = backend
        self.sites, self.layout = find_sites(model, targets)
        self.device = main_device(model)
        for output in outputs:
            check_identity(output.projection, self.layout.size)
        self._recomputed = checkpointable(model) if checkpoint_activations else []
        self.sharded = is_sharded(model)
        with frozen_eval(model), recorded_devices(self.sites, self.device) as devices:
            check_causal(model)
        self._devices = devices
        self._scratch = {device: Scratch(device) for device in devices}
        self._set_outputs(outputs)
        self.batches = choose_layout(model, self.device, packing)
        self._vocabulary = embedding_rows(model)

    def set_precondition(self, precondition: Precondition) -> None:
        """Precondition the gradients of every output so from now on; the model is not examined again.

        Raises LessFastError where an optimizer state does not fit, or the backend asked for by name cannot run it.
        """
        self._set_outputs([Output(output.projection, precondition) for output in self.outputs])

    def _set_outputs(self, outputs: Sequence[Output]) -> None:
        # First, as this may raise.
        rules = {id(output.precondition): self._rules(output.precondition) for output in outputs}
        self.outputs = list(outputs)
        self._source = [self._computed_by(i) for i in range(len(self.outputs))]
        self._computed = [
            self._compute(i, output.projection, rules[id(output.precondition)])
            for i, output in enumerate(self.outputs)
            if self._source[i] == i
        ]
        self.backends()  # one that cannot run is refused now, and not in the middle of a backward pass

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

    def _on(self, device: torch.device) -> ParameterLayout:
        """The parameters whose modules compute on a device."""
        return ParameterLayout(tuple(p for p, place in zip(self.layout.parameters, self._devices) if place == device))

    def _rules(self, precondition: Precondition) -> list[Rule]:
        found = {d: iter(precondition_rules(precondition, self._on(d), d)) for d in dict.fromkeys(self._devices)}
        return [next(found[device]) for device in self._devices]

    def _compute(self, index: int, projection: Projection, rules: list[Rule]) -> _Computed:
        bases = self.layout.run_bases(projection.block)
        prepared = [
            prepare(parameter, base, projection, rule, device, backend=self.backend)
            for parameter, base, rule, device in zip(self.layout.parameters, bases, rules, self._devices)
        ]
        lanes = {d: lanes_needed(self._on(d), projection, d, backend=self.backend) for d in set(self._devices)}
        return _Computed(index, projection, lanes, list(zip(bases, rules, prepared)))

    @torch.inference_mode(False)
    def __call__(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        """Features of every output for a batch; see :meth:`FeatureExtractor.__call__`."""
        inputs = Inputs.of(checked(batch, self._vocabulary), self.device, packed=self.batches.packed)
        check_length_invariant(self.model, inputs.tokens.lengths)
        n, shape = len(inputs.tokens), inputs.input_ids.shape
        labels = inputs.labels
        places = {device: self._place(device, n, inputs) for device in dict.fromkeys(self._devices)}
        losses = torch.zeros(n, device=self.device)
        if labels.target.numel():

            def receive(site: Site, value: Tensor, gradient: Tensor) -> None:
                # A module behind the label gather sees the examples' label tokens one after the other.
                gathered = value.shape[:2] == gradient.shape[:2] == (1, labels.target.numel())
                if not gathered and not value.shape[:2] == gradient.shape[:2] == shape:
                    rows = "1 row" if self.batches.packed else f"{n} examples"
                    raise LessFastError(
                        f"the module of {site.name} gets {tuple(value.shape)} and gives {tuple(gradient.shape)}; "
                        f"expected {rows} of {shape[1]} tokens first"
                    )
                self._receive(site, value, gradient, gathered, places[self._devices[site.index]])

            losses = self._run(inputs, receive)
        elif self.sharded:
            self._idle()
        # Without a gradient Adam's update would still be that of its momentum.
        empty = to_device(labels.counts == 0, self.device)[:, None] if 0 in inputs.predicting.lengths else None
        done: dict[int, Tensor] = {}
        for k, computed in enumerate(self._computed):
            features, *others = (sum_lanes(place.lanes[k]).to(self.device) for place in places.values())
            for other in others:
                features += other
            done[computed.index] = features if empty is None else features.masked_fill_(empty, 0.0)
        reduced = [
            reduce_features(done[k], self.outputs[k].projection, output.projection)
            for k, output in zip(self._source, self.outputs)
        ]
        return BatchFeatures(reduced, losses, labels.counts)

    def _place(self, device: torch.device, n: int, inputs: Inputs) -> _Place:
        lanes = [torch.zeros(c.lanes[device], n, c.projection.dim, device=device) for c in self._computed]
        tokens, predicting = (replace(x, table=x.table.to(device)) for x in (inputs.tokens, inputs.predicting))
        return _Place(lanes, tokens, predicting)

    def _run(self, inputs: Inputs, receive: Receiver) -> Tensor:
        own = self.batches.own_attention
        with attending(self.model, inputs.tokens) if own else nullcontext(), checkpointed(self._recomputed):
            return run(self.model, self.sites, inputs, receive, remade=bool(self._recomputed))

    def _idle(self) -> None:
        """A pass that yields nothing: the other ranks of a sharded model wait for this one's part of their weights."""
        two_tokens = torch.zeros(1, 2, dtype=torch.int64)
        batch = {"input_ids": two_tokens, "labels": two_tokens}
        self._run(Inputs.of(batch, self.device, packed=self.batches.packed), lambda site, value, gradient: None)

    def backends(self) -> list[str]:
        """The backend that computes each output, by name.

        Raises UnsupportedBackendError where the one that was asked for by name cannot.
        """
        computed = {c.index: c for c in self._computed}
        first = self.layout.parameters[0]
        grads = torch.empty(1, 1, 1, device=self._devices[0]).expand(1, first.short, first.long)
        used = []
        for source in self._source:
            c = computed[source]
            features = torch.empty(1, c.projection.dim, device=self._devices[0])
            used.append(resolve(features, grads, c.projection, self.backend, c.sites[0][1]))
        return used

    @property
    def max_examples(self) -> int:
        """Examples that a batch may have, so that features in the making take 2 GB at most."""
        return max(1, _MOST_FEATURE_BYTES // sum(4 * max(c.lanes.values()) * c.projection.dim for c in self._computed))

    @property
    def batch_cost(self) -> int | None:
        """What a batch costs beside its tokens, see :func:`~less_fast.data.plan_batches`; None: as few as possible."""
        if self.device.type != "cpu":
            return None
        return max(_DENSE_BATCH_COST.get(c.projection.kind, CPU_BATCH_COST) for c in self._computed)

    def computed(self) -> list[Projection]:
        """The projection each output is computed with: another than its own where it is a fold or prefix of that."""
        return [self.outputs[k].projection for k in self._source]

    def _receive(self, site: Site, value: Tensor, gradient: Tensor, gathered: bool, place: _Place) -> None:
        left, right = (gradient, value) if site.short_is_output else (value, gradient)
        targets = []
        for computed, partial in zip(self._computed, place.lanes):
            run_base, rule, prepared = computed.sites[site.index]
            targets.append(Target(partial, run_base, computed.projection, rule, prepared))
        outer_sketches(
            targets,
            left.flatten(0, 1),
            right.flatten(0, 1),
            place.predicting if gathered else place.tokens,
            self.layout.parameters[site.index],
            backend=self.backend,
            scratch=self._scratch[self._devices[site.index]],
        )


class FeatureExtractor:
    """Gradient features of one kind: per-example gradient, preconditioned, projected.

    Parameters
    ----------
    model : a Hugging Face causal LM, with a PEFT LoRA adapter or not. Its training flags, ``requires_grad`` flags and
        weights are as they were after every call.
    projection : the sketch.
    precondition : ``"sgd"`` (the raw gradient), ``"sign"``, or an :class:`AdamState`.
    targets : None for every LoRA matrix, or a regular expression searched in the names of Linear modules.
    backend : ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``.
    packing : ``auto`` computes examples without padding on CUDA where the model's attention has a kernel for that;
        ``always`` wherever the model gives the same features so, ``never`` nowhere.
    checkpoint_activations : keep of each decoder layer its input alone and run the layer once more in the backward
        pass: the same features, from less memory, in about 4/3 of the time. Offloaded models need it: otherwise the
        graph holds every weight that was fetched.

    A model may be spread over several devices (``device_map``), have base weights in 4 or 8 bits, or be sharded by
    FSDP2's ``fully_shard``. A sharded model's ranks have to make the same number of calls, with any batch each; for a
    rank that has none left, a batch of no examples (0, T) takes part and yields nothing.

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
        packing: Packing = "auto",
        checkpoint_activations: bool = False,
    ) -> None:
        self._engine = MultiFeatureExtractor(
            model,
            [Output(projection, precondition)],
            targets=targets,
            backend=backend,
            packing=packing,
            checkpoint_activations=checkpoint_activations,
        )
        self.layout = self._engine.layout

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features of a batch.

        Parameters
        ----------
        batch : ``input_ids`` and ``labels`` (N, T) int64, labels -100 where masked; ``attention_mask`` (N, T) where
            rows are padded (on either side). Best on the host: tensors on a device are fetched, which waits for it.

        Returns
        -------
        float32 (N, K): row n is Pi · u(g_n), g_n being the gradient of the mean cross-entropy of example n over its own
        label tokens, whatever else is in the batch. A row without labels is zero.
        """
        return self._engine(batch).features[0]
