"""The interface of ``sjlt`` 0.1.7 without its CUDA build: on any device, seeded, deterministic, for any c."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.ops import philox
from less_fast.ops.accumulate import resolve
from less_fast.ops.project import project
from less_fast.projection import MAX_NNZ, Projection

__version__ = "0.1.7"  # of the interface
CUDA_AVAILABLE = torch.cuda.is_available()
EXTENSION_AVAILABLE = True  # callers ask this before they construct a SJLTProjection, which works everywhere

# Entries of the tables that are generated at a time.
_ENTRIES = 1 << 20


def install() -> None:
    """Make ``import sjlt`` find this module in this process, whether or not sjlt is installed."""
    sys.modules["sjlt"] = sys.modules[__name__]


def get_cuda_info() -> dict[str, Any]:
    """What torch says of CUDA, by the original's keys."""
    info: dict[str, Any] = {"cuda_available": CUDA_AVAILABLE, "extension_available": EXTENSION_AVAILABLE}
    if CUDA_AVAILABLE:
        count = torch.cuda.device_count()
        info["cuda_version"] = torch.version.cuda
        info["cudnn_version"] = torch.backends.cudnn.version()
        info["device_count"] = count
        info["current_device"] = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        if count:
            info["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return info


class _Buffers(NamedTuple):
    """The buffers as a call found them; ``_version`` counts the writes to a tensor."""

    indices: Tensor
    signs: Tensor
    versions: tuple[int, int]

    def unchanged(self, other: _Buffers) -> bool:
        same = self.indices is other.indices and self.signs is other.signs
        # Tensors made in inference mode count no writes.
        return same and self.versions == other.versions and -1 not in self.versions


class _Bags(NamedTuple):
    """A sparse ±1 matrix by output: its inputs and signs (nnz,), and where each output's begin (outputs + 1,)."""

    inputs: Tensor
    signs: Tensor
    starts: Tensor


class SJLTProjection(nn.Module):
    """S in R^(proj_dim x original_dim) with c entries ±1/√c in each column.

    Parameters
    ----------
    original_dim, proj_dim, c : c <= proj_dim and <= 1024; two entries of a column that meet in one place are added.
    threads, fixed_blocks : kept as attributes, and otherwise ignored.
    device : where to compute; None takes CUDA where there is one. Input is moved to it; the attribute can be set.
    seed : of the matrix, which is that of ``Projection("sjlt", proj_dim, seed, nnz=c)``. None draws one from torch's
        generator, so that ``torch.manual_seed`` decides, as in the original.

    The buffers ``rand_indices`` (int64) and ``rand_signs`` (int8), (original_dim, c), are the matrix: whatever is
    written to them is applied. Writes that torch does not count (through ``.data`` or another library) are not seen.
    Equal calls give equal bits, with own tables and with written ones.

    Raises
    ------
    LessFastError
        for sizes and shapes that do not fit, input that is not floating point, or buckets out of range.
    """

    rand_indices: Tensor
    rand_signs: Tensor

    def __init__(
        self,
        original_dim: int,
        proj_dim: int,
        c: int = 1,
        threads: int = 1024,
        fixed_blocks: int = 84,
        device: str | torch.device | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        # index: NumPy's integers are integers too.
        original_dim, proj_dim, c = (operator.index(n) for n in (original_dim, proj_dim, c))
        if original_dim <= 0 or proj_dim <= 0:
            raise LessFastError(f"original_dim is {original_dim} and proj_dim {proj_dim}; expected positive numbers")
        if not 0 < c <= proj_dim:
            raise LessFastError(f"c is {c}; expected 1 to proj_dim = {proj_dim}")
        if c > MAX_NNZ:
            raise LessFastError(f"c is {c}; expected up to {MAX_NNZ}")
        seed = int(torch.randint(2**63 - 1, ()).item()) if seed is None else operator.index(seed)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.projection = Projection("sjlt", proj_dim, seed, nnz=c)
        self.original_dim = original_dim
        self.proj_dim = proj_dim
        self.c = c
        self.threads = max(32, threads // 32 * 32)
        self.fixed_blocks = fixed_blocks
        self.normalization_factor = 1.0 / math.sqrt(c)
        with torch.inference_mode(False):
            self.register_buffer("rand_indices", torch.empty(original_dim, c, dtype=torch.int64, device=device))
            self.register_buffer("rand_signs", torch.empty(original_dim, c, dtype=torch.int8, device=device))
            for rows, indices, signs in self._own_tables():
                self.rand_indices[rows] = indices
                self.rand_signs[rows] = signs
        self._seen: _Buffers | None = self._as_found()
        self._own = True
        self._bags: _Bags | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their writes anew, so that what was found here says nothing of them.
        return {**self.__dict__, "_seen": None, "_bags": None}

    @property
    def device(self) -> torch.device:
        """Where the buffers are; setting it moves them."""
        return self.rand_indices.device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.to(device)

    @torch.compiler.disable  # dattri compiles what calls this: one break, instead of tracing into our kernels' launches
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """S applied to each row of x: (N, original_dim) -> (N, proj_dim), of x's dtype; sums are in float32 or more."""
        x = self._checked(x, self.original_dim)
        if self._holds_own_tables() and self._kernels_take(x):
            return project(x, self.projection).to(x.dtype)
        return self._sums(x, self._by_bucket())

    @torch.compiler.disable
    @torch.no_grad()
    def transpose(self, y: Tensor) -> Tensor:
        """Sᵀ, the adjoint, applied to each row of y: (N, proj_dim) -> (N, original_dim), of y's dtype."""
        y = self._checked(y, self.proj_dim)
        if not self._holds_own_tables():
            self._by_bucket()  # it checks what was written
        indices, signs = self.rand_indices.flatten(), self.rand_signs.flatten()
        return self._sums(y, _Bags(indices, signs, torch.arange(0, len(indices) + 1, self.c, device=y.device)))

    def get_compression_ratio(self) -> float:
        """Input entries per output entry."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """Share of S that is zero, should no two entries of a column meet."""
        return 1.0 - self.c / self.proj_dim

    def extra_repr(self) -> str:
        return f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}, device={self.device}"

    def _checked(self, x: Tensor, width: int) -> Tensor:
        if x.ndim != 2 or x.shape[1] != width or not x.is_floating_point():
            raise LessFastError(f"input is {x.dtype} {tuple(x.shape)}; expected a floating-point (N, {width})")
        return x.to(self.device)

    def _own_tables(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The projection's buckets and signs, some columns of S at a time."""
        step = max(1, _ENTRIES // self.c)
        for start in range(0, self.original_dim, step):
            rows = slice(start, min(start + step, self.original_dim))
            index = torch.arange(rows.start, rows.stop, device=self.device)
            buckets, bits = philox.sjlt_columns(index, self.proj_dim, self.c, self.projection.seed)
            yield rows, buckets, 1 - 2 * bits.to(torch.int8)

    def _as_found(self) -> _Buffers:
        indices, signs = self.rand_indices, self.rand_signs
        return _Buffers(indices, signs, (_writes(indices), _writes(signs)))

    def _holds_own_tables(self) -> bool:
        """Whether the buffers are the projection's tables; they are compared once after a write."""
        found = self._as_found()
        if self._seen is None or not found.unchanged(self._seen):
            self._own = found.indices.shape == found.signs.shape == (self.original_dim, self.c) and all(
                torch.equal(found.indices[rows], indices) and torch.equal(found.signs[rows], signs)
                for rows, indices, signs in self._own_tables()
            )
            self._seen, self._bags = found, None
        return self._own

    def _kernels_take(self, x: Tensor) -> bool:
        """Whether ``project`` adds in a fixed order: torch's own scatter, which the reference uses, on a CPU only."""
        if x.device.type == "cpu":
            return True
        features = x.new_empty(0, self.proj_dim, dtype=torch.promote_types(x.dtype, torch.float32))
        return resolve(features, x.unsqueeze(1), self.projection) != "reference"

    def _by_bucket(self) -> _Bags:
        """S by rows, as the buffers last were; sorted once after a write."""
        if self._bags is None:
            shape = (self.original_dim, self.c)
            indices, signs = self.rand_indices, self.rand_signs
            if indices.shape != shape or signs.shape != shape:
                found = f"{tuple(indices.shape)} and {tuple(signs.shape)}"
                raise LessFastError(f"rand_indices and rand_signs have shapes {found}; expected {shape}")
            low, high = (int(value) for value in torch.aminmax(indices))
            if low < 0 or high >= self.proj_dim:
                raise LessFastError(
                    f"rand_indices hold {low} to {high}; expected 0 to proj_dim - 1 = {self.proj_dim - 1}"
                )
            buckets, order = torch.sort(indices.flatten(), stable=True)
            starts = torch.searchsorted(buckets, torch.arange(self.proj_dim + 1, device=buckets.device))
            self._bags = _Bags(order // self.c, signs.flatten()[order], starts)
        return self._bags

    def _sums(self, x: Tensor, bags: _Bags) -> Tensor:
        """(N, inputs) -> (N, outputs): each output adds up its own bag in order, hence the same bits every time."""
        outputs = len(bags.starts) - 1
        if len(x) == 0:
            return x.new_zeros(0, outputs)
        table = x.to(torch.promote_types(x.dtype, torch.float32)).T.contiguous()
        sums = nn.functional.embedding_bag(
            bags.inputs,
            table,
            bags.starts,
            mode="sum",
            per_sample_weights=bags.signs.to(table.dtype),
            include_last_offset=True,
        )
        return (sums.T * self.normalization_factor).to(x.dtype).contiguous()


def _writes(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
