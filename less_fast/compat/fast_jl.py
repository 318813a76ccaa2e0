"""``fast_jl``'s six functions, for any floating dtype, size and device, and on the CPU too.

``install()`` makes ``import fast_jl`` find this module; ``python -m less_fast.compat.fast_jl script.py args…`` does so
for a program that is not to be touched.
"""

from __future__ import annotations

import operator
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.ops.project import project
from less_fast.projection import Projection


class _Unscaled(Projection):
    """The same matrix with its ±1s and normals as they are: sums of integers stay integers."""

    @property
    def scale(self) -> float:
        return 1.0


def project_rademacher(grads: Tensor, dim: int, seed: int, num_feature_tiles: int = 0) -> Tensor:
    """Sums of the entries of ``grads`` (N, P) with random signs: (N, dim) in float32.

    The signs are those of ``Projection("rademacher", dim, seed)``. Up to 2²⁴ the sums of integers are exact.

    Parameters
    ----------
    grads : (N, P), any floating dtype, strides and device.
    dim, seed : any K from 1, and any seed from 0 to 2⁶⁴ − 1; the first features do not depend on ``dim``.
    num_feature_tiles : ignored; ``fast_jl``'s callers pass the number of multiprocessors, on which its matrix depends.

    Raises
    ------
    LessFastError
        for a matrix that is not 2-D floating point, or ``dim`` or ``seed`` out of range.
    """
    return _project("rademacher", grads, dim, seed)


def project_normal(grads: Tensor, dim: int, seed: int, num_feature_tiles: int = 0) -> Tensor:
    """Sums weighted by the standard normals of ``Projection("gaussian", dim, seed)``; the rest as with signs."""
    return _project("gaussian", grads, dim, seed)


# The numbers are examples per launch in fast_jl; here every call takes any number.
project_rademacher_8 = project_rademacher_16 = project_rademacher_32 = project_rademacher
project_normal_8 = project_normal_16 = project_normal_32 = project_normal


def _project(kind: str, grads: Tensor, dim: int, seed: int) -> Tensor:
    # index: NumPy's integers, which trak draws its seeds as, are integers too.
    return project(grads, _Unscaled(kind, operator.index(dim), operator.index(seed))).float()


def install() -> None:
    """Make ``import fast_jl`` find this module, in this process, whether or not fast_jl is installed.

    Raises LessFastError where another fast_jl has been imported already: whoever did may hold on to its functions.
    """
    this, found = sys.modules[__name__], sys.modules.get("fast_jl")
    if found not in (None, this):
        origin = getattr(found, "__file__", None) or "an unknown place"
        raise LessFastError(
            f"fast_jl is already imported, from {origin}; expected none: call install() before anything imports it"
        )
    sys.modules["fast_jl"] = this


def run_with(install: Callable[[], None], arguments: Sequence[str]) -> None:
    """Call ``install``, then run ``script.py args…`` or ``-m module args…`` as Python itself would.

    What is wrong with the arguments, or with installing, is one line on standard error and status 2.
    """
    module = arguments[1] if arguments[:1] == ["-m"] and len(arguments) > 1 else None
    try:
        if module is None and (not arguments or not Path(arguments[0]).is_file()):
            given = repr(arguments[0]) if arguments else "nothing"
            raise LessFastError(f"the program is {given}; expected a script's path or -m module, then its arguments")
        install()
    except LessFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if module is not None:
        sys.argv = list(arguments[1:])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    if not getattr(sys.flags, "safe_path", False):  # `python -m` put the working directory there
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    from less_fast.compat import fast_jl  # this file is __main__ now, and programs import it by its name

    run_with(fast_jl.install, sys.argv[1:])
