"""How much memory a call takes on the CPU."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_mebibytes(call: Callable[[], object]) -> float:
    """The most that tensors allocated by the call hold at a time, beyond what was there before; MiB.

    As PyTorch's allocator reports it; kernels' own scratch memory, fastgen's as oneDNN's, is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
