"""Quality of the systems on the bundled data: python -m benchmarks.quality [--row NAME] [--seed N], or `make quality`.

A row trains a system with its defaults and the row's options, measures it, and keeps the results in
benchmarks/results/quality.json, from which quality.md is made. A row that was stopped continues when it is run again.
"""

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from fastgen import tasks, training
from fastgen.data import load_dataset
from fastgen.training import CONFIGS
from fastgen.training.checkpoint import write_atomically
from fastgen.training.evaluation import psnr
from fastgen.training.run import read_metrics

_RESULTS = Path(__file__).parent / "results" / "quality.json"
_RUNS = Path("runs") / "quality"
_SAMPLES = 2000
_MINUTES = 15


@dataclass(frozen=True)
class Measure:
    """One number of a row, and what it is compared with."""

    name: str
    value: float
    target: float | None
    protocol: str
    better: str = "higher"
    baseline: float | None = None
    baseline_is: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


@dataclass(frozen=True)
class Row:
    """A system, its options, and how it is measured."""

    system: str
    measure: Callable[[Path, int], Iterator[Measure]]
    options: dict[str, Any] = field(default_factory=dict)


def _recognised(target: float, class_target: float | None = None) -> Callable[[Path, int], Iterator[Measure]]:
    def measure(folder: Path, seed: int) -> Iterator[Measure]:
        evaluation = training.evaluate(folder, _SAMPLES, seed)
        share = evaluation.recognised
        assert share is not None
        protocol = share.protocol
        yield Measure("recognised", share.share, target, protocol, baseline=share.real_share, baseline_is="real images")
        least = min(share.class_shares.values())
        yield Measure("rarest class", least, class_target, f"least share of {share.n} samples taken for one class")
        yield from _figures(evaluation.figures, {"fid": None})

    return measure


def _of_evaluation(**targets: float | None) -> Callable[[Path, int], Iterator[Measure]]:
    def measure(folder: Path, seed: int) -> Iterator[Measure]:
        yield from _figures(training.evaluate(folder, _SAMPLES, seed).figures, targets)

    return measure


def _figures(figures: dict[str, Any], targets: dict[str, float | None]) -> Iterator[Measure]:
    for name, target in targets.items():
        figure = figures[name]
        yield Measure(
            name.replace("_", " "),
            figure.value,
            target,
            figure.protocol,
            figure.better,
            figure.baseline,
            figure.baseline_is,
        )


def _vae(folder: Path, seed: int) -> Iterator[Measure]:
    """Likelihood against a PCA-Gaussian of the same latent size, and three restorations against model-free ones."""
    nll = training.evaluate(folder, _SAMPLES, seed).figures["nll"]
    yield Measure("nll", nll.value, nll.baseline, nll.protocol, "lower", nll.baseline, nll.baseline_is)
    model = training.load_model(folder)
    images = load_dataset("digits", model.config.image_size, split="test").all().images[:200]
    draw = torch.Generator().manual_seed(seed)

    noise = 0.5
    noisy = images + noise * torch.randn(images.shape, generator=draw)
    medians = {f"{size}x{size} median filter": psnr(_median(noisy, size), images) for size in (3, 5)}
    yield _restored("denoising", tasks.denoise(model, noisy, std=noise), images, medians, f"noise of {noise}")

    side = images.shape[2]
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
    known = images[:, :, ~mask].mean(2, keepdim=True)
    average = load_dataset("digits", side).all().images.mean(0, keepdim=True)[:, :, mask]
    hole = images[:, :, mask]
    fills = {
        "mean of the known pixels": psnr(known.expand_as(hole), hole),
        "mean image of the data": psnr(average.expand_as(hole), hole),
    }
    filled = tasks.inpaint(model, images, mask)[:, :, mask]
    yield _restored("inpainting", filled, hole, fills, "the middle half of height and width, PSNR of these pixels")

    factor = 8
    small = avg_pool2d(images, factor)
    bicubic = interpolate(small, scale_factor=factor, mode="bicubic").clamp(-1, 1)
    enlarged = tasks.upscale(model, small)
    yield _restored("super-resolution", enlarged, images, {"bicubic": psnr(bicubic, images)}, f"{factor} times")


def _restored(name: str, restored: Tensor, true: Tensor, others: dict[str, float], what: str) -> Measure:
    best = max(others, key=lambda other: others[other])
    protocol = f"PSNR in dB, mean of {len(true)} held-out digits: {what}; the latent is optimized for 100 steps; "
    protocol += ", ".join(f"{other} {value:.2f} dB" for other, value in others.items())
    return Measure(name, psnr(restored, true), others[best], protocol, "higher", others[best], best)


def _median(images: Tensor, size: int) -> Tensor:
    padded = pad(images, [size // 2] * 4, "reflect")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(4).values.clamp(-1, 1)


ROWS = {
    "gan-digits": Row("gan", _recognised(0.40)),
    "dcgan-digits": Row("dcgan", _recognised(0.60, 0.03)),
    "wgan_gp-digits": Row("wgan_gp", _recognised(0.60, 0.03)),
    "lsgan-digits": Row("lsgan", _recognised(0.60, 0.03)),
    "cgan-digits": Row("cgan", _of_evaluation(as_asked=0.90, fid=None)),
    "text2image-digits": Row("text2image", _of_evaluation(as_asked=0.90, fid=None)),
    "vae-digits": Row("vae", _vae),
    "cyclegan-colour-to-grey": Row("cyclegan", _of_evaluation(a_to_b_psnr=22.0, a_to_b_fid=None)),
    "cyclegan-grass-to-gravel": Row(
        "cyclegan",
        _of_evaluation(a_to_b_recognised=0.90, b_to_a_recognised=0.90),
        {"data": "grass-to-gravel", "identity": 0.0, "cycle": 2.0},
    ),
}


def main(row: str = "", seed: int = 0) -> None:
    """Train and measure the rows of the quality table, one after another.

    Args:
        row: The row to run; by default all.
        seed: Seed of weights, noise, data order and samples.
    """
    if row and row not in ROWS:
        sys.exit(f"unknown row {row!r}: choose from: {', '.join(ROWS)}")
    for name in [row] if row else ROWS:
        chosen = ROWS[name]
        config = replace(CONFIGS[chosen.system](), seed=seed, **chosen.options)
        folder = _RUNS / f"{name}-{seed}"
        result = training.train(config, folder, resume=(folder / "checkpoint.json").exists())
        if result.interrupted:
            sys.exit(f"{name} stopped at step {result.step}: the same command continues it")
        measures = list(chosen.measure(folder, seed))
        _keep(name, _entry(config, folder, measures))
        for measure in measures:
            print(f"{name}: {measure.name} {measure.value:.4g}, target {measure.target}")


def _entry(config: Any, folder: Path, measures: list[Measure]) -> dict[str, Any]:
    per_step = config.batch_size * getattr(config, "d_steps", 1)
    seconds, before = 0.0, 0
    for record in read_metrics(folder):
        seconds += (record["step"] - before) * per_step / record["images_per_second"]
        before = record["step"]
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "settings": config.to_json(),
        "training_seconds": round(seconds),
        "machine": f"{os.cpu_count()} processors ({platform.machine()}), {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit,
        "measures": [vars(measure) | {"met": measure.met} for measure in measures],
    }


def _keep(name: str, entry: dict[str, Any]) -> None:
    """Adds a row to the results, next to those of other runs."""
    _RESULTS.parent.mkdir(exist_ok=True)
    document = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    document[name] = entry
    write_atomically(_RESULTS, (json.dumps(document, indent=2) + "\n").encode())
    write_atomically(_RESULTS.with_suffix(".md"), table(document).encode())


def table(document: dict[str, Any]) -> str:
    """Markdown of the results; rows that were never run are marked."""
    lines = [
        "# Quality on the bundled data",
        "",
        "`make quality` runs all rows, `make quality ROW=name` one. Each trains a system with the defaults of the",
        f"command line and the options beside its name, for at most {_MINUTES} minutes on two cores, and is measured",
        "on held-out images. ✓: the target is met, ✗: it is not.",
        "",
        "| row | figure | value | target | beside | training |",
        "|---|---|---|---|---|---|",
    ]
    notes: dict[str, None] = {}
    titles = {
        name: ", ".join([name, *(f"{option} {value}" for option, value in row.options.items())])
        for name, row in ROWS.items()
    }
    for name in ROWS:
        entry = document.get(name)
        if entry is None:
            lines.append(f"| {titles[name]} | not yet measured | | | | |")
            continue
        settings, minutes = entry["settings"], entry["training_seconds"] / 60
        spent = f"{settings['steps']:,} steps, {minutes:.1f} min{' (over the limit)' if minutes > _MINUTES else ''}"
        for index, measure in enumerate(entry["measures"]):
            mark = {True: " ✓", False: " ✗", None: ""}[measure["met"]]
            sign = {"higher": "≥", "lower": "≤"}[measure["better"]]
            target = "" if measure["target"] is None else f"{sign} {measure['target']:.4g}{mark}"
            beside = "" if measure["baseline"] is None else f"{measure['baseline']:.4g} ({measure['baseline_is']})"
            first = (titles[name], spent) if index == 0 else ("", "")
            lines.append(
                f"| {first[0]} | {measure['name']} | {measure['value']:.4g} | {target} | {beside} | {first[1]} |"
            )
        where = (
            f"seed {settings['seed']}, torch {entry['torch']}, {entry['machine']}, {entry['date']}, {entry['commit']}"
        )
        for measure in entry["measures"]:
            notes[f"- {name}, {measure['name']} ({where}): {measure['protocol']}."] = None
    return "\n".join([*lines, "", "## Protocols", "", *notes]) + "\n"


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    tyro.cli(main)
