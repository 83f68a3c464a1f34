import datetime
import time
import warnings
from collections.abc import Callable

import pytest
import torch


def peak_gflops(size: int = 1536) -> float:
    """What the machine reaches in a float32 matrix product, the best of several: the ceiling of the tables."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


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
