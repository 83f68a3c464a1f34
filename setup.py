"""Builds the native ops ahead of time where torch and a compiler are at hand; else they are built at first use."""

import os
import sys
import warnings
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fastgen import _build


def native() -> dict:
    """The arguments of setup() that build ahead of time; none without torch, as in an isolated build."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError):
        return {}

    class BuildOrLeaveOut(BuildExtension):
        """A build that fails does not fail the installation."""

        def run(self) -> None:
            try:
                with _build.environment():
                    super().run()
            except Exception as error:  # whatever a compiler, ninja or setuptools raise
                warnings.warn(f"the native ops are left out, to be built at first use: {error}", stacklevel=1)
                self.extensions.clear()

    extension = CppExtension(
        f"fastgen._native_{_build.digest()}",
        [os.path.relpath(file) for file in _build.sources()],
        include_dirs=[str(_build.CSRC)],
        extra_compile_args=list(_build.CFLAGS),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrLeaveOut},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Folders of the repository that install inside the package.
folders = {f"fastgen.{name}": name for name in ("csrc", "kernels") if Path(name).is_dir()}
setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), *folders],
    package_dir=folders,
    package_data={"fastgen.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"]},
    **native(),
)
