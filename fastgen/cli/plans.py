"""Plans: a generator in one file that runs without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fastgen.cli._arguments import PlanFile, Run
from fastgen.cli.draw import plan_inputs
from fastgen.errors import UsageError


def export(run: Run, plan: Path = Path("generator.fgplan")) -> None:
    """Write a trained generator as a plan: one file of numbers that runs fast and without torch.

    Args:
        run: Run folder written by `fastgen train`.
        plan: File to write.
    """
    from fastgen.inference import Engine
    from fastgen.tasks import Drawing
    from fastgen.training import load_model

    model = Drawing(load_model(run))
    engine = Engine(model, model.example, impl="cpp")
    engine.save(plan)
    print(f"{plan}: {plan.stat().st_size / 1e6:.1f} MB, differs from the model by {engine.error:.1e} (relative L2)")


def bench(what: Positional[Literal["latency"]], plan: PlanFile, batch: int = 1, seconds: float = 3.0) -> None:
    """Measure how long a plan takes: `fastgen bench latency generator.fgplan`.

    Args:
        what: What to measure.
        plan: File written by `fastgen export`.
        batch: Number of images per call.
        seconds: How long to measure.
    """
    import time

    import numpy as np

    from fastgen.runtime import Plan

    if not 0 < seconds <= 3600:
        raise UsageError(f"seconds must be between 0 and 3600, not {seconds}")
    loaded = Plan.load(plan)
    inputs = plan_inputs(loaded, batch, seed=0)
    for _ in range(3):
        loaded(*inputs)
    milliseconds: list[float] = []
    end = time.perf_counter() + seconds
    while not milliseconds or time.perf_counter() < end:
        start = time.perf_counter()
        loaded(*inputs)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(milliseconds, (50, 99))
    print(f"batch {batch}, {loaded.threads} threads, {len(milliseconds)} calls: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
