"""How much memory a call takes on the CPU."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_mebibytes(call: Callable[[], object]) -> float:
    """The peak in MiB of the memory of tensors that the call allocates.

    PyTorch's allocator reports it; the scratch memory of kernels, fastgen's and oneDNN's, is not included.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
