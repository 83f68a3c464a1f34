"""`fastgen info` and `fastgen build`: the implementations of each op, and the native code."""

from __future__ import annotations

import inspect

from fastgen.cli._networks import Device, Dtype, networks
from fastgen.errors import UsageError


def info(
    explain: str = "",
    batch: int = 64,
    dtype: Dtype = "fp32",
    channels_last: bool = True,
    device: Device = "auto",
    training: bool = True,
) -> None:
    """Show which implementations of each op can run here, and why others cannot; or which ones a model's layers use.

    Args:
        explain: Name of a system or model (`dcgan`, `vae`, ...), at its usual size, or a run folder of `fastgen train`:
            print, layer by layer, what computes it and why. The other options belong to this one.
        batch: Images per call.
        dtype: Precision; other than fp32 by autocast.
        channels_last: Images and weights in channels_last order, as `fastgen train` has them.
        device: Device to run on; auto uses a GPU if there is one.
        training: Run in training mode, and explain the gradients of each layer's input and weight too.
    """
    if not explain:
        from fastgen import ops

        _refuse(batch=batch, dtype=dtype, channels_last=channels_last, device=device, training=training)
        print(ops.info())
        return
    import fastgen

    parts, autocast = networks(explain, batch, dtype, channels_last, device)
    for i, (title, network, inputs) in enumerate(parts):
        with autocast():
            print(f"{chr(10) * (i > 0)}{title}\n{fastgen.explain(network, *inputs, training=training)}")


def _refuse(**options: object) -> None:
    """Raises UsageError if one of the options that only `--explain` uses was changed."""
    defaults = inspect.signature(info).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise UsageError(f"{flag} belongs to --explain: say which model to explain, for example --explain dcgan")


def build() -> None:
    """Compile the native code now instead of at first use."""
    from fastgen._build import cuda, native, runtime
    from fastgen.ops import _tiers

    print(f"native ops: {native.build(verbose=True)}")
    print(f"plans: {runtime.load(build=True).__file__}")
    obstacle = _tiers.nvcc.why_absent("cuda", None) or cuda.obstacle()
    print(f"CUDA kernels: {obstacle or cuda.build(verbose=True)}")
