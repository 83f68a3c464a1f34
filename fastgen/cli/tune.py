from __future__ import annotations

from tyro.conf import Positional

from fastgen.cli._networks import Device, Dtype, networks
from fastgen.errors import UsageError


def tune(
    system: Positional[str],
    batch: int = 64,
    dtype: Dtype = "fp32",
    channels_last: bool = True,
    device: Device = "auto",
    training: bool = True,
    seconds: float = 120.0,
) -> None:
    """Measure which implementation of each convolution is fastest here, once; later runs use it.

    Args:
        system: Name of a system or model (`dcgan`, `vae`, ...), at its usual size, or a run folder of `fastgen train`.
        batch: Images per call, as in the later run.
        dtype: Precision; other than fp32 by autocast.
        channels_last: Images and weights in channels_last order, as `fastgen train` has them.
        device: Where to measure; auto uses a GPU if there is one.
        training: Measure gradients and batch statistics too.
        seconds: How long to measure.
    """
    import sys

    import fastgen

    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be positive and finite, not {seconds}")
    parts, autocast = networks(system, batch, dtype, channels_last, device)
    for title, network, inputs in parts:
        with autocast():
            report = fastgen.tune(
                network,
                *inputs,
                training=training,
                seconds=seconds / len(parts),
                progress=lambda line: print(line, file=sys.stderr),
            )
        print(f"{title}\n{report}")
