"""Builds the native code ahead of time where torch, pybind11 and a compiler are at hand; else at first use."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fastgen import _build


def native() -> dict:
    """The arguments of setup() that build ahead of time: the ops where torch is, the inference plan where pybind11 is.

    An isolated build has neither.
    """
    extensions: list[Extension] = []
    base: type[build_ext] = build_ext
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

        base = BuildExtension
        extensions.append(
            extension(CppExtension, "native", _build.digest(), _build.sources(), _build.CFLAGS, py_limited_api=True)
        )
        if _build.cuda_sources() and not _build.cuda_obstacle():
            of_cuda = {"cxx": list(_build.CUDA_CFLAGS), "nvcc": list(_build.NVCC_FLAGS)}
            extensions.append(
                extension(
                    CUDAExtension, "cuda", _build.cuda_digest(), _build.cuda_sources(), of_cuda, py_limited_api=True
                )
            )
    except (ImportError, OSError):
        pass
    try:
        import pybind11

        if sources := _build.runtime_sources():
            flags = _build.RUNTIME_CFLAGS
            extensions.append(extension(Extension, "runtime", _build.runtime_digest(), sources, flags))
            extensions[-1].include_dirs.append(pybind11.get_include())
    except ImportError:
        pass

    class BuildOrLeaveOut(base):  # type: ignore[misc,valid-type]
        """A build that fails does not fail the installation, nor the other libraries."""

        def build_extension(self, extension: Extension) -> None:
            with leaving_out():
                super().build_extension(extension)

        def run(self) -> None:
            with leaving_out(), _build.environment():
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
    except Exception as error:  # whatever a compiler, ninja or setuptools raise
        warnings.warn(f"native code is left out, to be built at first use: {error}", stacklevel=1)


def extension(
    kind: Callable,
    name: str,
    digest: str,
    sources: list[Path],
    flags: tuple[str, ...] | dict[str, list[str]],
    **options,
) -> Extension:
    return kind(
        f"fastgen._{name}_{digest}",
        [os.path.relpath(file) for file in sources],
        include_dirs=[str(_build.CSRC)],
        extra_compile_args=flags if isinstance(flags, dict) else list(flags),
        language="c++",
        optional=True,  # setuptools installs what there is of them
        **options,
    )


# Folders of the repository that install inside the package.
folders = {f"fastgen.{name}": name for name in ("csrc", "kernels") if Path(name).is_dir()}
setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), *folders],
    package_dir=folders,
    package_data={
        "fastgen.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"],
        "fastgen.ops": ["choices/*.json"],
    },
    **native(),
)
