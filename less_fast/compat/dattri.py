"""dattri's ``random_project`` and ``make_random_projector``; dattri-llm's ``projector=`` takes the former as well."""

from __future__ import annotations

import functools
import importlib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from less_fast.compat.trak import derived_seed
from less_fast.errors import LessFastError
from less_fast.ops.project import project
from less_fast.projection import Projection, widest_block

Features = Tensor | Mapping[str, Tensor]

_KINDS = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt", "grass": "sjlt", "srht": "srht"}
_GRASS_MULTIPLIER = 4


class ProjectionType(str, Enum):
    """dattri's names of distributions, and ``srht``."""

    identity = "identity"
    normal = "normal"
    rademacher = "rademacher"
    sjlt = "sjlt"
    random_mask = "random_mask"
    grass = "grass"
    srht = "srht"


@runtime_checkable
class ProjectionParams(Protocol):
    """What is read of the ``proj_params`` of dattri after 0.3.0 (its RandomProjectionParams)."""

    @property
    def feature_batch_size(self) -> int: ...
    @property
    def proj_dim(self) -> int: ...
    @property
    def proj_seed(self) -> int: ...
    @property
    def proj_type(self) -> str: ...
    @property
    def device(self) -> str | torch.device: ...


@dataclass(frozen=True)
class Projector:
    """A random matrix R^P -> R^K for each ensemble id, equal on every device and for every batch; no state.

    ``feature_dim``: P. ``proj_dim``: K. ``dtype``: of results; sums are made in float32 or more.
    ``normal``, ``rademacher``, ``sjlt`` (one non-zero per column) and ``srht`` keep inner products in expectation, and
    with ensemble id 0 they are ``Projection(kind, K, seed)``; ``random_mask`` keeps K entries as they are, ``grass``
    is ``sjlt`` of grass_multiplier · K entries, ``identity`` returns its input.
    """

    feature_dim: int
    proj_dim: int
    seed: int
    proj_type: ProjectionType
    device: torch.device
    dtype: torch.dtype = torch.float32
    grass_multiplier: int = _GRASS_MULTIPLIER

    def __post_init__(self) -> None:
        if self.proj_type != "identity" and self.proj_dim < 1:
            raise LessFastError(f"proj_dim is {self.proj_dim}; expected a positive number")
        if self.proj_type == "grass" and self.grass_multiplier < 1:
            raise LessFastError(f"the multiplier of grass is {self.grass_multiplier}; expected a positive number")
        if self.proj_type in _KINDS:
            self._projection(0)  # its errors belong here

    @torch.compiler.disable  # dattri compiles what calls this: one break, instead of tracing into our kernels' launches
    @torch.no_grad()
    def project(self, features: Features, ensemble_id: int = 0) -> Tensor:
        """(N, P), or a dict of (N, ...) that make up P columns in order -> (N, K) in ``dtype`` on ``device``.

        Raises LessFastError where the features have another shape.
        """
        flat = _columns(features)
        if flat.shape[1:] != (self.feature_dim,):
            raise LessFastError(
                f"features have shape {tuple(flat.shape)}; the projector was made for (N, {self.feature_dim})"
            )
        return self._sketch(flat.to(self.device), operator.index(ensemble_id)).to(self.dtype)

    dict_project = project

    def free_memory(self) -> None:
        """Nothing to free: no matrix is held."""

    def _sketch(self, flat: Tensor, ensemble_id: int) -> Tensor:
        if self.proj_type == "identity":
            return flat
        seed = derived_seed(self.seed % 2**64, ensemble_id)
        if self.proj_type in ("random_mask", "grass"):
            kept = self.proj_dim * (self.grass_multiplier if self.proj_type == "grass" else 1)
            flat = flat[:, _mask(self.feature_dim, min(kept, self.feature_dim), seed, flat.device)]
        return flat if self.proj_type == "random_mask" else project(flat, self._projection(seed))

    def _projection(self, seed: int) -> Projection:
        kind = _KINDS[self.proj_type.value]
        block = widest_block(self.proj_dim) if kind == "srht" else Projection.block
        return Projection(kind, self.proj_dim, seed, block=block)


def make_random_projector(
    param_shape_list: Sequence[int],
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int,
    device: str | torch.device,
    proj_seed: int = 0,
    proj_type: str = ProjectionType.sjlt,
    *,
    dtype: torch.dtype = torch.float32,
    grass_multiplier: int = _GRASS_MULTIPLIER,
) -> Projector:
    """A projector of features with ``sum(param_shape_list)`` columns; the two batch sizes do not matter here.

    Raises LessFastError for a ``proj_type`` that is none of :class:`ProjectionType`, or a ``proj_dim`` it cannot have.
    """
    named, multiplier = _parse(proj_type)
    return Projector(
        # index: NumPy's integers are integers too.
        feature_dim=operator.index(sum(param_shape_list)),
        proj_dim=operator.index(proj_dim),
        seed=operator.index(proj_seed),
        proj_type=named,
        device=torch.device(device),
        dtype=dtype,
        grass_multiplier=grass_multiplier if multiplier is None else multiplier,
    )


def random_project(
    feature: Features,
    feature_batch_size: int | ProjectionParams | None = None,
    proj_dim: int | None = None,
    proj_max_batch_size: int | None = None,
    proj_seed: int = 0,
    proj_type: str = "normal",
    *,
    device: str | torch.device = "cpu",
    proj_params: ProjectionParams | None = None,
) -> Callable[..., Tensor]:
    """A function (features, ensemble_id=0) -> (N, proj_dim), for features like ``feature``, in its dtype.

    Takes the arguments of dattri 0.3.0, or those of its later protocol: ``proj_params``, second or by name, any object
    with the attributes of :class:`ProjectionParams`. ``proj_max_batch_size`` is not needed. ``proj_type`` is one of
    :class:`ProjectionType` on any device, or ``grass_N`` with N as the multiplier.

    Raises LessFastError as :func:`make_random_projector` does, and for a missing batch size, ``proj_dim`` or feature.
    """
    if isinstance(feature_batch_size, ProjectionParams):
        feature_batch_size, proj_params = None, feature_batch_size
    if proj_params is not None:
        feature_batch_size, proj_dim = proj_params.feature_batch_size, proj_params.proj_dim
        proj_seed, proj_type, device = proj_params.proj_seed, proj_params.proj_type, proj_params.device
    if not feature_batch_size or proj_dim is None:
        raise LessFastError(
            f"feature_batch_size is {feature_batch_size} and proj_dim is {proj_dim}; expected two positive numbers"
        )
    tensors = _parts(feature) if isinstance(feature, Mapping) else [feature]
    sizes = [tensor.numel() // feature_batch_size for tensor in tensors]
    return make_random_projector(
        sizes, feature_batch_size, proj_dim, 0, device, proj_seed, proj_type, dtype=tensors[0].dtype
    ).project


def install() -> None:
    """Put these functions in the place of dattri's own, in every module of dattri that has them in this process.

    Raises LessFastError without dattri.
    """
    try:
        theirs = importlib.import_module("dattri.func.projection")
    except ImportError as error:
        raise LessFastError(
            f"dattri cannot be imported ({error}); pip install dattri, or import the functions from {__name__}"
        ) from error
    ours: dict[str, Any] = {"random_project": random_project, "make_random_projector": make_random_projector}
    for name, function in ours.items():
        replaced = getattr(theirs, name)
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "dattri" and getattr(module, name, None) is replaced:
                setattr(module, name, function)


def _parse(proj_type: str) -> tuple[ProjectionType, int | None]:
    """``grass_N`` is grass with the multiplier N; dattri's own enumeration has these values too."""
    value = str(getattr(proj_type, "value", proj_type))
    name, _, multiplier = value.partition("_") if value.startswith("grass_") else (value, "", "")
    if name not in ProjectionType.__members__ or (multiplier and not multiplier.isdecimal()):
        expected = ", ".join(ProjectionType.__members__)
        raise LessFastError(f"proj_type is {value!r}; expected one of {expected}, or grass_N with a number N")
    return ProjectionType(name), int(multiplier) if multiplier else None


def _columns(features: Features) -> Tensor:
    if not isinstance(features, Mapping):
        return features
    return torch.cat([part.reshape(len(part), math.prod(part.shape[1:])) for part in _parts(features)], 1)


def _parts(features: Mapping[str, Tensor]) -> list[Tensor]:
    if not features:
        raise LessFastError("the features are an empty mapping; expected a tensor (N, ...) per parameter")
    return list(features.values())


@functools.lru_cache(maxsize=16)
def _mask(size: int, kept: int, seed: int, device: torch.device) -> Tensor:
    """``kept`` different numbers below ``size``, in order: int64."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(np.sort(generator.choice(size, kept, replace=False, shuffle=False))).to(device)
