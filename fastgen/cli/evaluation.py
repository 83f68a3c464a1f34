"""`fastgen evaluate`: measures the quality of a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgen.cli._arguments import Run

if TYPE_CHECKING:
    from fastgen.training.evaluation import Evaluation


def evaluate(run: Run, n: int = 1000, seed: int = 0) -> None:
    """Measure a trained model's samples and write evaluation.json into the run folder.

    Args:
        run: Run folder written by `fastgen train`.
        n: Number of samples to measure.
        seed: Seed of the noise.
    """
    from fastgen.training import evaluate

    print_evaluation(evaluate(run, n, seed))
    print(f"  saved in    {run / 'evaluation.json'}  (shown in {run / 'report.html'})")


def print_evaluation(result: Evaluation) -> None:
    if share := result.recognised:
        print(f"  recognised  {share.share:.1%} of {share.n} samples (real images: {share.real_share:.1%})")
        print("  by class    " + "  ".join(f"{name} {value:.1%}" for name, value in share.class_shares.items()))
        print(f"  protocol    {share.protocol}")
    for name, figure in result.figures.items():
        baseline = "" if figure.baseline is None else f" ({figure.baseline_is}: {figure.baseline:.4g})"
        print(f"  {name:<11} {figure.value:.4g}{baseline}, {figure.better} is better")
    for protocol in dict.fromkeys(figure.protocol for figure in result.figures.values()):
        print(f"    {protocol}")
