from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from fastgen.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from fastgen.metrics import ClassifierShare


def train_page() -> None:
    """Train a model on a data set; leaves a run folder."""


def generate(run: Positional[Path], n: int = 64, seed: int = 0, out: Path = Path("grid.png")) -> None:
    """Draw new images with a trained model, into one picture.

    Args:
        run: Run folder that `fastgen train` left, or plan file that `fastgen export` wrote (then torch is not imported).
        n: Number of images.
        seed: Seed of the noise; the same seed gives the same picture.
        out: Picture to write; its ending says the format.
    """
    from fastgen.images import picture_format, save_grid

    picture_format(out)  # a wrong ending shows before the work is done
    if run.is_file():
        from fastgen.runtime import Plan

        plan = Plan.load(run)
        save_grid(plan(_noise(plan.input_shape, n, seed)), out)
    else:
        from fastgen.training import load_model, sample

        save_grid(sample(load_model(run), n, seed).numpy(), out)
    print(f"{n} images in {out}")


def export(run: Positional[Path], plan: Path = Path("generator.fgplan")) -> None:
    """Write a trained generator as a plan: one file of numbers that runs fast and without torch.

    Args:
        run: Run folder that `fastgen train` left.
        plan: File to write.
    """
    from fastgen.inference import Engine
    from fastgen.training import load_model

    model = load_model(run)
    engine = Engine(model, model.latent(1), impl="cpp")
    engine.save(plan)
    print(f"{plan}: {plan.stat().st_size / 1e6:.1f} MB, differs from the model by at most {engine.error:.1e}")


def bench(what: Positional[Literal["latency"]], plan: Positional[Path], batch: int = 1, seconds: float = 3.0) -> None:
    """Measure how long a plan takes: `fastgen bench latency generator.fgplan`.

    Args:
        what: What to measure.
        plan: File that `fastgen export` wrote.
        batch: Images at a time.
        seconds: How long to measure.
    """
    import time

    import numpy as np

    from fastgen.runtime import Plan

    if not 0 < seconds <= 3600:
        raise UsageError(f"seconds must be between 0 and 3600, not {seconds}")
    loaded = Plan.load(plan)
    z = _noise(loaded.input_shape, batch, 0)
    for _ in range(3):
        loaded(z)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        loaded(z)
        taken.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(taken, (50, 99))
    print(f"batch {batch}, {loaded.threads} threads, {len(taken)} calls: p50 {p50:.3f} ms, p99 {p99:.3f} ms")


def _noise(shape: tuple[int, ...], n: int, seed: int) -> np.ndarray:
    import numpy as np

    most = max(1, 2**26 // max(1, int(np.prod(shape))))
    if not 1 <= n <= most:
        raise UsageError(f"the number of images must be between 1 and {most}, not {n}")
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")
    return np.random.default_rng(seed).standard_normal((n, *shape), dtype=np.float32)


def evaluate(run: Positional[Path], n: int = 1000, seed: int = 0) -> None:
    """Measure a trained model's samples; writes evaluation.json into the run folder.

    Args:
        run: Run folder that `fastgen train` left.
        n: Number of samples to measure.
        seed: Seed of the noise.
    """
    from fastgen.training import evaluate

    result = evaluate(run, n, seed)
    if result is None:
        print("this run's data set has no classifier to measure with")
    else:
        print_evaluation(result)
        print(f"  kept in     {run / 'evaluation.json'}")


def info() -> None:
    """Show which implementation of each op can run here, and why not where it cannot."""
    from fastgen import ops

    print(ops.info())


def build() -> None:
    """Compile the native code now instead of at first use."""
    from fastgen import _build

    print(f"native ops: {_build.build(verbose=True)}")
    print(f"plans: {_build.load_runtime(build=True).__file__}")


def print_evaluation(result: ClassifierShare) -> None:
    print(f"  recognised  {result.share:.1%} of {result.n} samples (real images: {result.real_share:.1%})")
    print("  by class    " + "  ".join(f"{name} {share:.1%}" for name, share in result.class_shares.items()))
    print(f"  protocol    {result.protocol}")
