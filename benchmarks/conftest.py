import datetime
import statistics
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastgen.training import keep_freed_memory

WARM, TURN = 0.02, 0.05  # seconds per turn for warm-up and for the measurement
torch._dynamo.config.recompile_limit = 64  # one function, compiled for several networks, layouts and precisions


def pytest_addoption(parser):
    parser.addoption("--stock-memory", action="store_true", help="leave freed memory to the C library, in all columns")


def pytest_configure(config):
    if not config.getoption("--stock-memory"):
        keep_freed_memory()  # for all columns: page faults are most of the noise


def peak_gflops() -> float:
    """The machine's peak in float32, the ceiling of the tables: the best of several matrix products and
    convolutions."""
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


def peak_bandwidth() -> float:
    """The bandwidth in GB/s (read + written) of a 256 MB copy, the other ceiling."""
    source, target = torch.ones(2, 2**26)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def pytest_benchmark_update_machine_info(config, machine_info):
    """The facts that a figure depends on, without the machine's name."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", "unknown"),
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        peak_gflops=round(peak_gflops()),
        peak_bandwidth=round(peak_bandwidth(), 1),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
    )


@pytest.fixture
def measure(benchmark, pytestconfig) -> Callable[..., None]:
    """measure(calls, facts, table=, row=) times one row of a table of the report. calls: column -> call; facts: column
    -> its facts.

    The columns take turns, so that the machine's other load affects all alike. A turn is a pause, in which the threads
    of the previous turn stop spinning, then uncounted calls for warm-up (one, or WARM seconds), then the counted calls.
    Facts: `correct` and `error`, `mebibytes` (peak memory that a call allocates); for the row: `flops` and `bytes`, if
    known.
    """

    def run(
        calls: dict[str, Callable[[], object]],
        facts: dict[str, dict[str, object]],
        rounds: int = 15,
        **line: object,
    ) -> None:
        seconds: dict[str, list[float]] = {column: [] for column in calls}

        def turns() -> None:
            for column, call in calls.items():
                time.sleep(0.02)
                start = time.perf_counter()
                took = timed(call)
                while time.perf_counter() < start + WARM:
                    took = timed(call)
                for _ in range(max(1, int(TURN / took))):
                    seconds[column].append(timed(call))

        lines = benchmark.extra_info.setdefault("lines", [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if lines:  # pytest-benchmark itself times only once per test
                for _ in range(rounds):
                    turns()
            else:
                benchmark.pedantic(turns, rounds=rounds, warmup_rounds=0, iterations=1)
        if pytestconfig.getoption("--stock-memory"):
            line["row"] = f"{line['row']}, stock memory"
        lines.append({**line, "cells": {column: facts[column] | spread(times) for column, times in seconds.items()}})

    return run


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(times, n=4)
    return {"median": quarters[1], "iqr": quarters[2] - quarters[0], "calls": len(times)}
