"""What is here: the implementations of each op, and the native code."""

from __future__ import annotations


def info() -> None:
    """Show which implementations of each op can run here, and why the others cannot."""
    from fastgen import ops

    print(ops.info())


def build() -> None:
    """Compile the native code now instead of at first use."""
    from fastgen._build import cuda, native, runtime
    from fastgen.ops import _tiers

    print(f"native ops: {native.build(verbose=True)}")
    print(f"plans: {runtime.load(build=True).__file__}")
    obstacle = _tiers.nvcc.why_absent("cuda", None) or cuda.obstacle()
    print(f"CUDA kernels: {obstacle or cuda.build(verbose=True)}")
