"""``Projector``: what ``trak.projectors`` promises its callers, for CPUs and GPUs, with or without trak installed.

``install()`` puts it in place of trak's own classes; so does ``python -m less_fast.compat.trak script.py args…`` for a
program that is not to be touched.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import operator
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from less_fast.compat.fast_jl import run_with
from less_fast.errors import LessFastError
from less_fast.ops.project import project
from less_fast.projection import Projection, widest_block


class ProjectionType(str, Enum):
    """trak's two distributions and less_fast's structured ones; each equals its name."""

    normal = "normal"
    rademacher = "rademacher"
    sjlt = "sjlt"
    srht = "srht"


class Projector:
    """A projector for ``TRAKer(projector=…)``, and a stand-in for CudaProjector and BasicProjector.

    Features are √K·Π·g, of the size that trak's ±1s and normals give, so its own normalisation and ``lambda_reg``
    keep their meaning.

    Parameters
    ----------
    grad_dim : P, which gradients are checked against; 0 where it is not known.
    proj_dim : K; of ``srht`` a multiple of 8, better of 64.
    seed : 0 to 2⁶⁴ − 1. With model_id 0, Π is that of ``Projection(kind, proj_dim, seed)`` on the flat layout.
    proj_type : ``normal``, ``rademacher``, ``sjlt`` or ``srht``, or a member of trak's enumeration or of ours.
    device : where gradients are moved to; None leaves them.
    model_id : what ``project`` takes unless it is told.

    All else that callers pass (``block_size``, ``max_batch_size``, ``dtype``, …) is accepted and has no effect.

    Raises
    ------
    LessFastError
        for an unknown ``proj_type``, or ``proj_dim`` or ``seed`` out of range.
    """

    def __init__(
        self,
        grad_dim: int = 0,
        proj_dim: int = 2048,
        seed: int = 0,
        proj_type: str | ProjectionType = ProjectionType.srht,
        device: str | torch.device | None = None,
        *args: Any,
        model_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.grad_dim, self.proj_dim, self.seed = (operator.index(n) for n in (grad_dim, proj_dim, seed))
        try:
            self.proj_type = ProjectionType(proj_type)
        except ValueError:
            expected = ", ".join(kind.value for kind in ProjectionType)
            raise LessFastError(f"proj_type is {proj_type!r}; expected one of {expected}") from None
        self.device = device
        self.model_id = model_id
        self.num_sms = 1  # some callers set it; no matrix depends on it
        self.projection(model_id)

    def projection(self, model_id: int) -> Projection:
        """The projection of one checkpoint: independent of every other's."""
        kind = "gaussian" if self.proj_type == "normal" else self.proj_type.value
        block = widest_block(self.proj_dim) if kind == "srht" else Projection.block
        return Projection(kind, self.proj_dim, derived_seed(self.seed, model_id), block=block)

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int | None = None) -> Tensor:
        """Features (N, K), float32, or float64 for float64 gradients.

        Parameters
        ----------
        grads : (N, P), any floating dtype; or parameter name -> (N, ...), laid out one after the other in that order.
        model_id : which checkpoint's matrix; the constructor's unless given.

        Raises
        ------
        LessFastError
            where P is not ``grad_dim``, or the mapping is empty.
        """
        if isinstance(grads, Mapping):
            grads = _flat(grads, self.device)
        elif self.device is not None:
            grads = grads.to(self.device)
        if self.grad_dim and grads.shape[1:] != (self.grad_dim,):
            raise LessFastError(
                f"gradients have shape {tuple(grads.shape)}; expected (N, {self.grad_dim}), "
                "or a projector made with the grad_dim they have"
            )
        projection = self.projection(self.model_id if model_id is None else model_id)
        return project(grads.detach(), projection).mul_(math.sqrt(self.proj_dim))

    def free_memory(self) -> None:
        """Nothing is held between calls."""


BasicProjector = CudaProjector = Projector


def derived_seed(seed: int, index: int) -> int:
    """The seed of one matrix of a family: ``seed`` for index 0, otherwise 64 bits that no other pair is likely to have.

    Sums of a seed and a multiple of the index, as trak and dattri have them, make different pairs meet.
    """
    if not index:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed:d} {index:d}".encode(), digest_size=8).digest(), "little")


def _flat(grads: Mapping[str, Tensor], device: str | torch.device | None) -> Tensor:
    """(N, P) of gradients (N, ...) per parameter; a parameter without dimensions has (N,)."""
    if not grads:
        raise LessFastError("the gradients are an empty mapping; expected a tensor (N, ...) per parameter")
    parts = [g.detach().flatten(1) if g.ndim > 1 else g.detach()[:, None] for g in grads.values()]
    return torch.cat([part.to(parts[0].device if device is None else device) for part in parts], dim=1)


def install() -> None:
    """Put :class:`Projector` in place of trak's projectors, in this process.

    ``TRAKer`` takes it from then on, and so does whoever imports the classes from ``trak.projectors`` afterwards.
    trak's NoOpProjector and ChunkedCudaProjector, which calls the others, stay. Raises LessFastError without trak.
    """
    try:
        modules = [importlib.import_module(f"trak.{name}") for name in ("projectors", "traker")]
    except ImportError as error:
        raise LessFastError(
            f"trak cannot be imported ({error}); pip install traker, or import the projectors from {__name__}"
        ) from error
    modules[0].AbstractProjector.register(Projector)
    for module in modules:
        for name in ("BasicSingleBlockProjector", "BasicProjector", "CudaProjector"):
            if hasattr(module, name):
                setattr(module, name, Projector)


if __name__ == "__main__":
    from less_fast.compat import trak  # this file is __main__ now, and trak has to hold the importable class

    run_with(trak.install, sys.argv[1:])
