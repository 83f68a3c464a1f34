"""Keeps freed CPU memory for the next training step, which would otherwise fetch fresh pages."""

import torch

from fastgen._build import native

torch.library.define("fastgen::keep_freed_memory", "(int major, int minor) -> bool")


def keep_freed_memory() -> bool:
    """Makes PyTorch keep the memory of freed CPU tensors (of 64 KiB or more) for later ones, until the process ends.

    Otherwise the memory that a training step frees returns to the system, and the next step fetches it again page by
    page: 19,000 page faults of 2 to 10 microseconds per step of DCGAN-64 at batch 64. `fastgen train` calls this. The
    process then holds up to twice the most memory that its tensors needed at once.

    Returns:
        False if the native ops are missing, or were built for another minor version of PyTorch, whose allocators are
        not a stable interface.
    """
    if native.load() is not None:
        return False
    major, minor = torch.__version__.split(".")[:2]
    return torch.ops.fastgen.keep_freed_memory(int(major), int(minor))
