import datetime
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F


def peak_gflops() -> float:
    """What the machine reaches in float32, the best of several matrix products and convolutions: the ceiling of the tables."""
    a, b = torch.randn(2, 1536, 1536)
    x = torch.randn(4, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    best = 0.0
    for call, flops in ((lambda: a @ b, 2 * 1536**3), (lambda: F.conv2d(x, weight), 2 * 4 * 30 * 30 * weight.numel())):
        for _ in range(12):
            start = time.perf_counter()
            call()
            best = max(best, flops / (time.perf_counter() - start) / 1e9)
    return best


def pytest_benchmark_update_machine_info(config, machine_info):
    """What decides a figure; not the machine's name."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", "unknown"),
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        peak_gflops=round(peak_gflops()),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
    )


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """measure(call, table=, row=, column=, flops=, error=, correct=) times `call`: one cell of a table of the report."""

    def run(call: Callable[[], object], rounds: int = 15, **facts: object) -> None:
        benchmark.extra_info.update(facts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=3, iterations=1)

    return run
