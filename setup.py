"""Builds the native code ahead of time if torch, pybind11 and a compiler are available; otherwise at first use."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fastgen._build import cuda, native, runtime, toolchain
from fastgen._build.library import Library


def native_code() -> dict:
    """The arguments of setup() that build ahead of time: the ops if torch is available, and the plan if pybind11 is.

    An isolated build has neither.
    """
    extensions: list[Extension] = []
    base: type[build_ext] = build_ext
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

        base = BuildExtension
        extensions.append(extension(CppExtension, native.library, native.library.flags, py_limited_api=True))
        if cuda.library.sources() and not cuda.obstacle():
            flags = {"cxx": list(cuda.CXX_FLAGS), "nvcc": list(cuda.NVCC_FLAGS)}
            extensions.append(extension(CUDAExtension, cuda.library, flags, py_limited_api=True))
    except (ImportError, OSError):
        pass
    try:
        import pybind11

        if runtime.sources():
            extensions.append(extension(Extension, runtime, runtime.FLAGS))
            extensions[-1].include_dirs.append(pybind11.get_include())
    except ImportError:
        pass

    class BuildOrLeaveOut(base):  # type: ignore[misc,valid-type]
        """A failed build fails neither the installation nor the other libraries."""

        def build_extension(self, extension: Extension) -> None:
            with leaving_out():
                super().build_extension(extension)

        def run(self) -> None:
            with leaving_out(), toolchain.environment():
                super().run()

    if not extensions:
        return {}
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildOrLeaveOut},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


@contextlib.contextmanager
def leaving_out() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a compiler, ninja or setuptools raises
        warnings.warn(f"native code is left out, to be built at first use: {error}", stacklevel=1)


def extension(
    kind: Callable, library: Library | ModuleType, flags: tuple[str, ...] | dict[str, list[str]], **options
) -> Extension:
    return kind(
        f"fastgen._{library.name}_{library.digest()}",
        [os.path.relpath(file) for file in library.sources()],
        include_dirs=[str(toolchain.CSRC)],
        extra_compile_args=flags if isinstance(flags, dict) else list(flags),
        language="c++",
        optional=True,  # setuptools installs those that were built
        **options,
    )


# Folders of the repository that are installed inside the package.
folders = {f"fastgen.{name}": name for name in ("csrc", "kernels") if Path(name).is_dir()}
setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), *folders],
    package_dir=folders,
    package_data={
        "fastgen.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"],
        "fastgen.ops": ["choices/*.json"],  # written by `make gpu`; none is in the repository yet
    },
    **native_code(),
)
