"""Builds the optional C++ and CUDA modules; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs as pure Python, without nvcc it goes without its CUDA module.
LESS_FAST_STRICT=1 turns a build that failed into a failure. LESS_FAST_CUDA_ARCHS, "90" or "80 90", names the
architectures to build for. No torch is needed to build.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

STRICT = os.environ.get("LESS_FAST_STRICT", "0") not in ("", "0")
# No FP contraction: the AVX2 and the portable path then perform the same roundings in the same order.
FLAGS = (
    ["/O2", "/fp:precise"]
    if sys.platform == "win32"
    else ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-fvisibility=hidden"]
)
CUDA_MODULE = "less_fast._cuda"
CUDA_ARCHS = (80, 90, 100)  # A100; H100, H200; B200. Others run the newest one's PTX, or go without.
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-cudart=static", "-Xptxas=--warn-on-spills"]
NVCC_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def find_nvcc():
    """Path of nvcc: CUDACXX, or the one on the PATH; None where there is none, or where it is not used (Linux only)."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) if sys.platform.startswith("linux") else None


def code_flags(nvcc):
    """What to generate: machine code of every wanted architecture that this nvcc knows, and PTX of the newest."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", listed)}
    asked = [int(number) for number in re.findall(r"\d+", os.environ.get("LESS_FAST_CUDA_ARCHS", ""))]
    if not set(asked) <= known:
        raise ValueError(f"LESS_FAST_CUDA_ARCHS names {asked}; this nvcc knows {sorted(known)}")
    archs = sorted(set(asked)) or [arch for arch in CUDA_ARCHS if arch in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class OptionalBuild(build_ext):
    """build_ext that leaves an extension out, saying so, where it cannot be compiled."""

    def build_extension(self, ext):
        """Compile ``ext``, or say why the package goes without it."""
        try:
            if ext.name == CUDA_MODULE:
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            if STRICT:
                raise
            print(f"less_fast: {ext.name} was not built ({error}); other backends will be used", file=sys.stderr)

    def build_cuda(self, ext):
        """Compile and link ``ext`` with nvcc, which knows where its toolkit and its host compiler are."""
        nvcc = find_nvcc()
        if nvcc is None:
            print(f"less_fast: {ext.name} is left out: there is no nvcc on the PATH", file=sys.stderr)
            return
        includes = [*ext.include_dirs, pybind11.get_include(), sysconfig.get_path("include")]
        output = self.get_ext_fullpath(ext.name)
        os.makedirs(self.build_temp, exist_ok=True)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        common = [nvcc, *NVCC_FLAGS, *code_flags(nvcc), *[f"-I{folder}" for folder in includes]]
        objects = []
        for source in ext.sources:
            objects.append(os.path.join(self.build_temp, os.path.basename(source) + ".o"))
            host = ",".join(NVCC_HOST_FLAGS)
            strict = ["-Werror=all-warnings"] if STRICT and source.endswith(".cu") else []
            subprocess.run([*common, *strict, f"-Xcompiler={host}", "-c", source, "-o", objects[-1]], check=True)
        subprocess.run([*common, "-shared", "-Xlinker=-s", *objects, "-o", output], check=True)

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
            ["csrc/cpu_module.cpp", "csrc/cpu_ops.cpp", "csrc/cpu_score.cpp", "csrc/thread_pool.cpp"],
            depends=[
                "csrc/cpu_ops.h",
                "csrc/cpu_dense.inl",
                "csrc/cpu_kernels.inl",
                "csrc/cpu_score.h",
                "csrc/cpu_score_bits.inl",
                "csrc/cpu_score_kernels.inl",
                "csrc/cpu_score_tables.inl",
                "csrc/philox.h",
                "csrc/thread_pool.h",
            ],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=[] if sys.platform in ("win32", "darwin") else ["-pthread", "-s"],
        ),
        Extension(
            CUDA_MODULE,
            ["csrc/cuda_module.cpp", "csrc/cuda_srht.cu", "csrc/cuda_sjlt.cu", "csrc/cuda_sum.cu"],
            depends=["csrc/cuda_ops.h", "csrc/cuda_entries.cuh", "csrc/philox.h"],
            include_dirs=["csrc"],
            language="c++",
        ),
    ],
    cmdclass={"build_ext": OptionalBuild},
)
