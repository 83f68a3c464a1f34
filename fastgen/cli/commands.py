from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from fastgen.metrics import ClassifierShare


def train_page() -> None:
    """Train a model on a data set; leaves a run folder."""


def generate(run: Positional[Path], n: int = 64, seed: int = 0, out: Path = Path("grid.png")) -> None:
    """Draw new images with a trained model, into one picture.

    Args:
        run: Run folder that `fastgen train` left.
        n: Number of images.
        seed: Seed of the noise; the same seed gives the same picture.
        out: Picture to write; its ending says the format.
    """
    from fastgen.data import picture_format, save_grid
    from fastgen.training import load_model, sample

    picture_format(out)  # a wrong ending shows before the work is done
    save_grid(sample(load_model(run), n, seed), out)
    print(f"{n} images in {out}")


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
    """Compile the native extension now instead of at first use."""
    from fastgen import _build

    print(f"native ops: {_build.build(verbose=True)}")


def print_evaluation(result: ClassifierShare) -> None:
    print(f"  recognised  {result.share:.1%} of {result.n} samples (real images: {result.real_share:.1%})")
    print("  by class    " + "  ".join(f"{name} {share:.1%}" for name, share in result.class_shares.items()))
    print(f"  protocol    {result.protocol}")
