"""Builds the optional C++ module; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs as pure Python. LESS_FAST_STRICT=1 turns a part that was skipped into a
failure. No torch is needed to build.
"""

import os
import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

STRICT = os.environ.get("LESS_FAST_STRICT", "0") not in ("", "0")
# No FP contraction: the AVX2 and the portable path then perform the same roundings in the same order.
FLAGS = (
    ["/O2", "/fp:precise"]
    if sys.platform == "win32"
    else ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-fvisibility=hidden"]
)


class OptionalBuild(build_ext):
    """build_ext that leaves an extension out, saying so, where it cannot be compiled."""

    def build_extension(self, ext):
        """Compile ``ext``, or say why the package goes without it."""
        try:
            super().build_extension(ext)
        except Exception as error:
            if STRICT:
                raise
            print(
                f"less_fast: {ext.name} was not built ({error}); the pure-torch backend will be used", file=sys.stderr
            )

    def copy_extensions_to_source(self):
        """Editable installs: copy only what was built."""
        built = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_in_build(ext))]
        self.extensions, every = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = every

    def get_ext_fullpath_in_build(self, ext):
        """Where the compiled file of ``ext`` lies before it is copied."""
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


setup(
    ext_modules=[
        Pybind11Extension(
            "less_fast._cpu",
            ["csrc/cpu_module.cpp", "csrc/cpu_ops.cpp", "csrc/thread_pool.cpp"],
            depends=[
                "csrc/cpu_ops.h",
                "csrc/cpu_kernels.inl",
                "csrc/philox.h",
                "csrc/thread_pool.h",
            ],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=[] if sys.platform in ("win32", "darwin") else ["-pthread", "-s"],
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)
