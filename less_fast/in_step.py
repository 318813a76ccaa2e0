"""Who makes a shard: one process alone, or the ranks of a sharded model, which compute its batches in step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.features import BatchFeatures, MultiFeatureExtractor
from less_fast.model.budget import is_out_of_memory
from less_fast.model.devices import sharded_modules
from less_fast.store.manifest import differences
from less_fast.store.sharing import Claim
from less_fast.workers import Worker

_Value = TypeVar("_Value")
# A batch's examples, tokens, and the longest example's tokens.
Size = tuple[int, int, int]
_MAX_DIFFERENCES = 4


class Alone:
    """A process with a model of its own: it decides, computes every batch and writes."""

    leads = True

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker or Worker()
        self.main = self.worker.rank == 0  # the one of all processes that shows progress and tells of the result

    def all(self, value: _Value) -> list[_Value]:
        """The value of every rank."""
        return [value]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise LessFastError where ranks are to make different stores."""

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What a rank raises in the block, every rank raises."""
        yield

    def from_leader(self, make: Callable[[], _Value]) -> _Value:
        """What ``make`` gives on the rank that leads."""
        return make()

    def claims(self, claims: Iterable[Claim]) -> Iterator[Claim]:
        """The leader's claims, as it makes them; on other ranks without writers."""
        yield from claims

    def deal(self, batches: Sequence[list[int]]) -> list[list[int]]:
        """This rank's batches; every rank has the same number, the last of them empty perhaps."""
        return list(batches)

    def compute(
        self, extractor: MultiFeatureExtractor, batch: Mapping[str, Tensor], size: Size
    ) -> BatchFeatures | None:
        """Features of a batch; None where this attempt at the shard has failed, which :meth:`collect` will say."""
        return extractor(batch)

    def collect(self, arrays: Sequence[np.ndarray], rows: list[int]) -> list[int]:
        """Bring the ``rows`` of every rank into the leader's arrays; returns those that came from others.

        Raises torch.OutOfMemoryError on all ranks where one had too little memory for a batch of its own.
        """
        return []

    def too_large(self, last: Size) -> set[Size]:
        """Sizes of the batches that found no memory in an attempt that ended with such an error."""
        return {last}

    def close(self) -> None:
        """Return when all ranks have come here."""


class InStep:
    """The ranks of a model that ``fully_shard`` has sharded: they gather its weights together, layer by layer.

    Every rank calls the same methods, those of :class:`Alone`, in the same order. The first one leads. What they tell
    each other goes through host memory (gloo), whatever the weights go through.

    A pass that runs out of memory has gathered some of the weights and not the rest, for which the other ranks wait.
    Where torch can reset the model (2.13), such a rank runs a tiny pass that gathers the rest alone, takes part with
    empty batches, and all begin the shard anew with half the budget; otherwise it ends with an error.
    """

    def __init__(self, model: nn.Module, ranks: list[int]) -> None:
        self._model = model
        self._group = _host_group(ranks)
        self._first, self._size, self._rank = ranks[0], len(ranks), ranks.index(dist.get_rank())
        self.leads = self._rank == 0
        # Replicas are told apart by the first of their ranks, which need not follow each other.
        self.worker = Worker(ranks[0], 0, dist.get_world_size() - len(ranks) + 1)
        self.main = self.leads and self.worker.rank == 0
        self._gathers = _Gathers(model)
        self._too_large: list[Size] = []
        self._agreed: set[Size] = set()

    def all(self, value: _Value) -> list[_Value]:
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def check_same(self, facts: Mapping[str, Any]) -> None:
        for rank, others in enumerate(self.all(dict(facts))):
            if lines := differences(dict(facts), others):
                raise LessFastError(
                    f"the model is sharded over ranks that are to make different stores (here -> rank {rank}): "
                    f"{'; '.join(lines[:_MAX_DIFFERENCES])}; give all of them the same arguments"
                )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        texts = self.all(None if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text is not None:
                raise LessFastError(f"{text} (on rank {rank} of the model's {self._size})")

    def from_leader(self, make: Callable[[], _Value]) -> _Value:
        made: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(made, src=self._first, group=self._group)
        value: _Value = made[0]
        return value

    def claims(self, claims: Iterable[Claim]) -> Iterator[Claim]:
        own = iter(claims)
        claim: Claim | None = None

        def shard() -> int | None:
            nonlocal claim
            claim = next(own, None)
            return None if claim is None else claim.shard

        while (number := self.from_leader(shard)) is not None:
            yield claim or Claim(number, [])

    def deal(self, batches: Sequence[list[int]]) -> list[list[int]]:
        rounds = -(-len(batches) // self._size)
        own = list(batches[self._rank :: self._size])
        self._too_large = []
        self._agreed = set()
        return own + [[]] * (rounds - len(own))

    def compute(
        self, extractor: MultiFeatureExtractor, batch: Mapping[str, Tensor], size: Size
    ) -> BatchFeatures | None:
        self._gathers.begin()
        if not self._too_large:
            try:
                return extractor(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self._gathers.can_resume:
                    n, tokens, longest = size
                    budget = max(1, (tokens if extractor.batches.packed else n * longest) // 2)
                    raise LessFastError(
                        f"out of memory on {extractor.device} in a batch of {n} examples and {tokens} tokens, which "
                        "this version of torch can't take back from the other ranks of a sharded model (2.13 can); "
                        f"begin again in another folder with token_budget={budget}"
                    ) from error
                self._too_large.append(size)
            self._gathers.resume()  # here the error, which holds the pass and its memory, is gone
        none = torch.zeros(0, 1, dtype=torch.int64)
        extractor({"input_ids": none, "labels": none})
        return None

    def collect(self, arrays: Sequence[np.ndarray], rows: list[int]) -> list[int]:
        self._agreed = {size for sizes in self.all(self._too_large) for size in sizes}
        if self._agreed:
            raise torch.OutOfMemoryError("out of memory on a rank")
        parts: list[Any] | None = [None] * self._size if self.leads else None
        own = None if self.leads else (rows, [array[rows] for array in arrays])
        dist.gather_object(own, parts, dst=self._first, group=self._group)
        others: list[int] = []
        for indices, values in (part for part in parts or [] if part is not None):
            for array, value in zip(arrays, values):
                array[indices] = value
            others += indices
        return others

    def too_large(self, last: Size) -> set[Size]:
        if not self._agreed:
            raise LessFastError(
                "out of memory outside of the model's passes, which the other ranks of the sharded model do not see; "
                "begin again with smaller batches (token_budget) or shards (shard_size), in another folder"
            )
        return self._agreed

    def close(self) -> None:
        self.all(None)


Ranks = Alone | InStep


def ranks_of(model: nn.Module) -> Ranks:
    """Those that hold the model together; a call on every one of them.

    Raises LessFastError for a model that is not sharded over one dimension of one mesh by FSDP2, in one dtype.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()  # a forward pass alone leaves weights gathered
    spread: list[Any] = [p for p in model.parameters() if hasattr(p, "full_tensor")]
    if not spread:
        return Alone(Worker.from_environment())
    meshes = {p.device_mesh for p in spread}
    dimensions = {tuple(i for i, place in enumerate(p.placements) if not place.is_replicate()) for p in spread}
    if not modules or len(meshes) > 1 or len(dimensions) > 1 or len(min(dimensions)) != 1:
        raise LessFastError(
            "the model's weights are spread over processes in another way than by FSDP2's fully_shard along one "
            "dimension of one mesh (tensor parallelism, perhaps), whose ranks can't take different batches; "
            "shard it with fully_shard alone"
        )
    (mesh,), ((dimension,),) = meshes, dimensions
    if any(p.device.type != mesh.device_type for p in model.parameters()):
        raise LessFastError(
            f"weights are on another device than their mesh, which is of {mesh.device_type} devices; "
            "use fully_shard without an offload_policy"
        )
    for module in modules:
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if policy is not None and {policy.param_dtype, policy.output_dtype} != {None}:
            raise LessFastError(
                "the model is sharded with a mixed-precision policy, so that its weights are not those that compute; "
                "load it in the dtype to compute in and use fully_shard without mp_policy"
            )
    return InStep(model, dist.get_process_group_ranks(mesh.get_group(dimension)))


# By ranks; with the world that it was made in. One that is made again after its end would find the old one's addresses.
_host_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _host_group(ranks: list[int]) -> Any:
    """The group of these ranks that goes through host memory; made by them alone, the first time that they ask."""
    world, group = _host_groups.get(tuple(ranks), (None, None))
    if world is None or world is not dist.group.WORLD:
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _host_groups[tuple(ranks)] = (dist.group.WORLD, group)
    return group


class _Gathers:
    """Counts the all-gathers of a model's pass, so that a pass that failed can be ended by another one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = sharded_modules(model)
        inner = {child for module in self._modules for child in module.modules() if child is not module}
        self._roots = [module for module in self._modules if module not in inner]
        self.can_resume = all(hasattr(module, "reset_iter_state") for module in self._roots)
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._made = self._skip = 0
        for module in self._modules if self.can_resume else []:
            module.set_custom_all_gather(self)

    def begin(self) -> None:
        """Before a pass: it begins with no weights gathered, on any rank."""
        for module in self._modules:
            module.reshard()
        self._made = self._skip = 0

    def resume(self) -> None:
        """After a failed pass: the next one leaves out the gathers that this one has made."""
        for root in self._roots:
            root.reset_iter_state()
        for name, flag in self._flags.items():  # a pass that ends early puts them back on gathered weights
            self._model.get_parameter(name).requires_grad_(flag)
        self._skip, self._made = self._made, 0
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer of gathered weights, as FSDP2 asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """All-gather weights, as FSDP2 asks for it."""
        if self._skip:
            self._skip -= 1
            output_tensor.zero_()
            return None
        work = dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self._made += 1
        return work
