"""Run launchers of less_fast.kernels in Triton's interpreter, which needs a process of its own, or on a CUDA device.

Triton decides at import whether kernels are interpreted, so one process cannot both interpret and compile them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Run = Callable[..., Any]


def kernels(name: str) -> ModuleType:
    """The module less_fast.kernels.``name``; skips (fails under LESS_FAST_STRICT=1) where Triton is not installed."""
    require_triton()
    return importlib.import_module(f"less_fast.kernels.{name}")


def require_triton() -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    if os.environ.get("LESS_FAST_STRICT") == "1":
        pytest.fail("triton is not installed, and LESS_FAST_STRICT=1 allows no skipping")
    pytest.skip("triton is not installed", allow_module_level=True)


def interpreted(launcher: str, *args: Any) -> Any:
    """Run "module.launcher" as if on CUDA tensors: it writes to its first argument, or returns tensors."""
    return _run(lambda packed: _worker().submit(_call, launcher, packed).result(), args)


def on_cuda(launcher: str, *args: Any) -> Any:
    """The same on the current CUDA device."""
    return _run(lambda packed: _call(launcher, packed, "cuda"), args)


def interpreted_backend(features: Tensor, grads: Tensor, *where: Any) -> Tensor:
    """What ``accumulate_triton`` makes of CPU tensors in the interpreter; ``where``: its other arguments."""
    written: np.ndarray = _worker().submit(_backend, features.numpy(), grads.numpy(), where).result()
    return torch.from_numpy(written)


def in_interpreter(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """The result of an importable function in the interpreter's process."""
    return _worker().submit(function, *args, **settings).result()


def _backend(features: np.ndarray, grads: np.ndarray, where: Sequence[Any]) -> np.ndarray:
    from less_fast.ops.triton import accumulate_triton

    target = torch.from_numpy(features.copy())
    accumulate_triton(target, torch.from_numpy(grads), *where)
    return target.numpy()


def runners() -> list[Any]:
    """Parameters of a fixture: the interpreter and, marked ``gpu``, the device."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [
        pytest.param(interpreted, id="interpreter"),
        pytest.param(on_cuda, id="cuda", marks=[pytest.mark.gpu, absent]),
    ]


@functools.cache
def _worker() -> ProcessPoolExecutor:
    """One process for all tests; concurrent.futures ends it at exit."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)


@dataclass(frozen=True)
class _Strided:
    """A CPU tensor with all of its storage, which pickling a view would drop."""

    storage: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> _Strided:
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        numbers = storage.view(torch.int16) if x.dtype == torch.bfloat16 else storage  # numpy has no bfloat16
        return cls(numbers.numpy(), x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))


def _run(call: Callable[[list[Any]], tuple[np.ndarray, list[np.ndarray]]], args: Sequence[Any]) -> Any:
    packed = [_Strided.of(x) if isinstance(x, Tensor) else x for x in args]
    written, results = call(packed)
    if isinstance(packed[0], _Strided):
        packed[0].storage[:] = written
    tensors = tuple(torch.from_numpy(result) for result in results)
    return tensors[0] if len(tensors) == 1 else tensors


def _call(launcher: str, packed: Sequence[Any], device: str = "cpu") -> tuple[np.ndarray, list[np.ndarray]]:
    """The first argument's storage after the launch (empty if it is no tensor), and the results."""
    storages = [torch.from_numpy(x.storage).to(device).view(x.dtype) if isinstance(x, _Strided) else x for x in packed]
    args = [
        storage.as_strided(x.shape, x.stride, x.offset) if isinstance(x, _Strided) else x
        for x, storage in zip(packed, storages)
    ]
    args = [torch.device(device) if isinstance(x, torch.device) else x for x in args]
    module, name = launcher.split(".")
    result = getattr(importlib.import_module(f"less_fast.kernels.{module}"), name)(*args)
    written = storages[0].cpu().numpy() if isinstance(storages[0], Tensor) else np.empty(0)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return written, [x.cpu().numpy() for x in results]


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which also fills torch.empty with NaN or the largest integer
    _repair_index()


def _repair_index() -> None:
    """Triton 3.6 makes ints of arrays with one dimension, for the bounds of loops, which NumPy 2.4 refuses."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = repaired
