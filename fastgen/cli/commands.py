from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro import conf
from tyro.conf import Positional

from fastgen.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from fastgen.runtime import Plan
    from fastgen.training.evaluation import Evaluation


def train_page() -> None:
    """Train a model on a data set; leaves a run folder."""


def generate(
    run: Positional[Path],
    n: int = 64,
    seed: int = 0,
    label: Annotated[int | None, conf.arg(name="class")] = None,
    text: str | None = None,
    interpolate: int = 0,
    out: Path = Path("grid.png"),
) -> None:
    """Draw new images with a trained model, into one picture.

    Args:
        run: Run folder that `fastgen train` left, or plan file that `fastgen export` wrote (then torch is not
            imported).
        n: Number of images.
        seed: Seed of the noise; the same seed gives the same picture.
        label: Number of the class to draw, for a model that was trained with classes.
        text: What to draw, for a model that was trained with captions.
        interpolate: Random images to go through, in n steps: a strip, or with --out ending in .gif an endless
            animation.
        out: Picture to write; its ending says the format.
    """
    from fastgen.images import picture_format, save_grid

    picture_format(out)  # a wrong ending shows before the work is done
    if run.is_file() and (text is not None or interpolate):
        raise UsageError("a plan takes neither --text nor --interpolate: give the run folder")
    if run.is_file():
        from fastgen.runtime import Plan

        plan = Plan.load(run)
        save_grid(plan(*_inputs(plan, n, seed, label)), out)
    else:
        from fastgen.tasks import conditions
        from fastgen.training import load_model, sample

        model = load_model(run)
        if interpolate:
            _draw_way(model, n, interpolate, seed, label, text, out)
        else:
            given = conditions(model, n, label=label, text=text) if 1 <= n <= 2**20 else {}
            save_grid(sample(model, n, seed, **given).numpy(), out)
    print(f"{n} images in {out}")


def _draw_way(model: Any, n: int, points: int, seed: int, label: int | None, text: str | None, out: Path) -> None:
    import torch

    from fastgen.data import save_animation, save_grid
    from fastgen.tasks import interpolate
    from fastgen.training.run import check_seed

    check_seed(seed)
    moving = out.suffix.lower() == ".gif"
    draw = torch.Generator().manual_seed(seed)
    images = interpolate(model, n, points=points, closed=moving, label=label, text=text, generator=draw)
    if moving:
        save_animation(images, out)
    else:
        save_grid(images, out, columns=min(n, 16))


def reconstruct(run: Positional[Path], pictures: Positional[Path], out: Path, strict: bool = False) -> None:
    """Pass pictures through a VAE's code and back.

    Args:
        run: Run folder of a VAE.
        pictures: Folder of pictures, or one; each is scaled down and cut to the model's size.
        out: Folder to write to.
        strict: A picture that cannot be used is an error; otherwise it is named and left out.
    """
    from fastgen.tasks import reconstruct

    model = _load_vae(run)
    _transform(model, pictures, out, strict, lambda image: reconstruct(model, image))


def denoise(
    run: Positional[Path],
    pictures: Positional[Path],
    out: Path,
    std: float = 0.2,
    steps: int = 100,
    strict: bool = False,
) -> None:
    """Take the noise out of pictures with a VAE.

    Args:
        run: Run folder of a VAE, at its best trained with --task denoise.
        pictures: Folder of pictures, or one; each is scaled down and cut to the model's size.
        out: Folder to write to.
        std: Standard deviation of the noise; black is -1 and white 1.
        steps: Steps of the search for the picture.
        strict: A picture that cannot be used is an error; otherwise it is named and left out.
    """
    from fastgen.tasks import denoise

    model = _load_vae(run)
    _transform(model, pictures, out, strict, lambda image: denoise(model, image, std=std, steps=steps))


def inpaint(
    run: Positional[Path], pictures: Positional[Path], mask: Path, out: Path, steps: int = 100, strict: bool = False
) -> None:
    """Fill in what is missing of pictures with a VAE.

    Args:
        run: Run folder of a VAE, at its best trained with --task inpaint.
        pictures: Folder of pictures, or one; each is scaled down and cut to the model's size.
        mask: Picture that is white where the pictures are to be filled in, scaled and cut as they are.
        out: Folder to write to.
        steps: Steps of the search for the picture.
        strict: A picture that cannot be used is an error; otherwise it is named and left out.
    """
    import torch

    from fastgen.data import read_image
    from fastgen.tasks import inpaint

    model = _load_vae(run)
    missing = torch.from_numpy(read_image(mask, 1, image_size=model.config.image_size)[0] >= 128)
    if not missing.any():
        raise UsageError(f"mask {mask} is nowhere white (128 of 255 or more): nothing would be filled in")
    _transform(model, pictures, out, strict, lambda image: inpaint(model, image, missing, steps=steps))


def upscale(
    run: Positional[Path],
    pictures: Positional[Path],
    out: Path,
    factor: int = 4,
    steps: int = 100,
    strict: bool = False,
) -> None:
    """Enlarge pictures to a VAE's size.

    Args:
        run: Run folder of a VAE, at its best trained with --task upscale.
        pictures: Folder of pictures, or one; each is scaled down and cut to the model's size over `factor`.
        out: Folder to write to.
        factor: How many times higher and wider they become.
        steps: Steps of the search for the picture.
        strict: A picture that cannot be used is an error; otherwise it is named and left out.
    """
    from fastgen.tasks import upscale

    model = _load_vae(run)
    size = model.config.image_size
    if factor < 2 or size % factor:
        raise UsageError(f"factor must be 2 or more and divide the model's {size} pixels, not {factor}")
    _transform(model, pictures, out, strict, lambda image: upscale(model, image, steps=steps), size // factor)


def translate(
    run: Positional[Path],
    pictures: Positional[Path],
    out: Path,
    direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
    tile: int = 256,
    overlap: int = 64,
    strict: bool = False,
) -> None:
    """Turn pictures of one domain into the other with a CycleGAN; they may have any size.

    Args:
        run: Run folder of a CycleGAN.
        pictures: Folder of pictures, or one.
        out: Folder to write to.
        direction: From the first domain to the second, or back.
        tile: Height and width of the tiles that a large picture is worked on in.
        overlap: Pixels that neighbouring tiles share.
        strict: A picture that cannot be used is an error; otherwise it is named and left out.
    """
    from fastgen.tasks import transform_pictures, translate
    from fastgen.training import load_model

    model = load_model(run)
    if not hasattr(model, "translate"):
        raise UsageError(f"{run} holds a {type(model).__name__}, and to translate takes a CycleGAN")
    channels = model.config.channels_a if direction == "a_to_b" else model.config.channels_b
    written = transform_pictures(
        pictures,
        out,
        lambda image: translate(model, image, direction, tile=tile, overlap=overlap),
        channels,
        grey_as_colour=True,
        strict=strict,
    )
    print(f"{len(written)} pictures in {out}")


def _load_vae(run: Path) -> Any:
    from fastgen.training import load_model

    model = load_model(run)
    if not hasattr(model, "encode"):
        raise UsageError(f"{run} holds a {type(model).__name__}, and this takes a VAE")
    return model


def _transform(
    model: Any, pictures: Path, out: Path, strict: bool, function: Callable[[Any], Any], size: int | None = None
) -> None:
    from fastgen.tasks import transform_pictures

    size = size or model.config.image_size
    written = transform_pictures(pictures, out, function, model.config.channels, image_size=size, strict=strict)
    print(f"{len(written)} pictures in {out}")


def export(run: Positional[Path], plan: Path = Path("generator.fgplan")) -> None:
    """Write a trained generator as a plan: one file of numbers that runs fast and without torch.

    Args:
        run: Run folder that `fastgen train` left.
        plan: File to write.
    """
    from fastgen.inference import Engine
    from fastgen.tasks import Drawing
    from fastgen.training import load_model

    model = Drawing(load_model(run))
    engine = Engine(model, model.example, impl="cpp")
    engine.save(plan)
    print(f"{plan}: {plan.stat().st_size / 1e6:.1f} MB, differs from the model by {engine.error:.1e} (relative L2)")


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
    inputs = _inputs(loaded, batch, 0)
    for _ in range(3):
        loaded(*inputs)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        loaded(*inputs)
        taken.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(taken, (50, 99))
    print(f"batch {batch}, {loaded.threads} threads, {len(taken)} calls: p50 {p50:.3f} ms, p99 {p99:.3f} ms")


def _inputs(plan: Plan, n: int, seed: int, label: int | None = None) -> list[np.ndarray]:
    """Noise, and for a plan that takes labels the class or, by default, the classes in turn."""
    import numpy as np

    classes = [given.classes for given in plan.inputs if given.classes is not None]
    if label is not None and not classes:
        raise UsageError("a class is given, and this plan draws without one")
    if label is not None and not 0 <= label < min(classes):
        raise UsageError(f"the class must be between 0 and {min(classes) - 1}, not {label}")
    return [
        _noise(given.shape, n, seed) if given.classes is None
        else np.full(n, label) if label is not None else np.arange(n) % given.classes
        for given in plan.inputs
    ]  # fmt: skip


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

    print_evaluation(evaluate(run, n, seed))
    print(f"  kept in     {run / 'evaluation.json'}  (shown: {run / 'report.html'})")


def info() -> None:
    """Show which implementation of each op can run here, and why not where it cannot."""
    from fastgen import ops

    print(ops.info())


def build() -> None:
    """Compile the native code now instead of at first use."""
    from fastgen._build import cuda, native, runtime
    from fastgen.ops import _tiers

    print(f"native ops: {native.build(verbose=True)}")
    print(f"plans: {runtime.load(build=True).__file__}")
    obstacle = _tiers.nvcc.why_absent("cuda", None) or cuda.obstacle()
    print(f"CUDA kernels: {obstacle or cuda.build(verbose=True)}")


def print_evaluation(result: Evaluation) -> None:
    if share := result.recognised:
        print(f"  recognised  {share.share:.1%} of {share.n} samples (real images: {share.real_share:.1%})")
        print("  by class    " + "  ".join(f"{name} {value:.1%}" for name, value in share.class_shares.items()))
        print(f"  protocol    {share.protocol}")
    for name, figure in result.figures.items():
        beside = "" if figure.baseline is None else f" ({figure.baseline_is}: {figure.baseline:.4g})"
        print(f"  {name:<11} {figure.value:.4g}{beside}, {figure.better} is better")
    for protocol in dict.fromkeys(figure.protocol for figure in result.figures.values()):
        print(f"    {protocol}")
