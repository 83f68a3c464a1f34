"""What a training step's memory costs on the CPU: fresh pages."""

import torch

from fastgen._build import native

torch.library.define("fastgen::keep_freed_memory", "(int major, int minor) -> bool")


def keep_freed_memory() -> bool:
    """Has PyTorch keep the memory of freed CPU tensors (from 64 KiB) for the next ones; returns whether it does.

    Otherwise what the end of a step frees goes back to the system, and the next step fetches it again page by page:
    19,000 page faults of 2 to 10 microseconds in a step of DCGAN-64 at batch 64. For a process that trains, whose next
    step needs what this one freed; `fastgen train` calls it. The process then holds up to twice the most that its
    tensors took at a time. Tensors of any origin may be freed after the call, which holds until the process ends.

    False where the native ops are missing, or were built with another minor version of PyTorch than this one (its
    allocators are no stable interface).
    """
    if native.load() is not None:
        return False
    major, minor = torch.__version__.split(".")[:2]
    return torch.ops.fastgen.keep_freed_memory(int(major), int(minor))
