import contextlib
import dataclasses
import json
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import __version__
from fastgen.data import DomainPair, ImageDataset, load_dataset, save_grid
from fastgen.errors import CheckpointError, DataError, FastgenError, UsageError
from fastgen.models.registry import config_class
from fastgen.options import with_current_names
from fastgen.training import checkpoint, run
from fastgen.training.config import TrainConfig
from fastgen.training.evaluation import Evaluation, check_classes
from fastgen.training.nonfinite import NotFiniteError, trace
from fastgen.training.progress import Interruption, Progress
from fastgen.training.recipes import RECIPES, Recipe

_GRID = 64  # samples in a grid during training


@dataclass(frozen=True)
class TrainResult:
    """The result of a call of `train`."""

    folder: Path
    step: int
    interrupted: bool
    """Ctrl-C or SIGTERM stopped the run: the checkpoint is at `step`, and `train(..., resume=True)` continues there."""
    images_per_second: float
    """Of the steps only, without samples and checkpoints; 0 if no step was left."""
    evaluation: Evaluation | None
    """None if interrupted, or if nothing could be measured."""


@torch.inference_mode(False)
@torch.enable_grad()
def train(config: TrainConfig, out: str | Path, *, resume: bool = False) -> TrainResult:
    """Trains a system and writes a run folder.

    On the CPU, a run that is stopped and resumed ends with the same bits as one that was not.

    Args:
        config: settings, whose class selects the system.
        out: the run folder: new or empty, or with `resume` that of a run with the same settings (except for those in
            `config.resumable`).
        resume: continue from the folder's checkpoint.

    Raises:
        UsageError: a setting that is invalid or cannot change.
        CheckpointError: nothing to resume, or a damaged checkpoint.
        FastgenError: the folder is in use, or a loss is no longer finite; the last good checkpoint stays.
        OSError: a file cannot be written; the last good checkpoint stays.
    """
    folder = Path(out)
    if resume:
        _check_same_run(run.read_config(folder), config)
    device = choose_device(config.device)
    data = load_dataset(config.data, config.image_size, strict=config.strict)
    with run.claim(folder, new=not resume), _without_autocast(device):
        try:
            return _train(config, folder, data, device, resume)
        except NotFiniteError as error:
            failure = error.with_traceback(None)  # the traceback would keep the recipe and its networks in memory
        where = _trace(config, folder, data, device, failure.step)
        raise FastgenError(f"{failure}; {where}")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns off the caller's autocast: a run has its own, and inside another one the cast weights would outlive a
    step."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False, cache_enabled=False)


def _start(
    config: TrainConfig, folder: Path, data: ImageDataset | DomainPair, device: torch.device, resume: bool
) -> tuple[int, Recipe]:
    """The number of steps done, and the recipe in that state."""
    meta, state = checkpoint.load(folder) if resume else ({"step": 0, "position": 0}, None)
    position = meta.get("position")
    if type(position) is not int or position < 0:
        raise CheckpointError(f"{folder / checkpoint.NAME} is damaged: no position in the data")
    torch.manual_seed(config.seed)
    noise = torch.Generator("cpu").manual_seed(config.seed)
    recipe = RECIPES[config.system](config, data, device, noise, state)
    recipe.position = position
    if resume:
        _check_same_data(meta.get("model"), recipe)
    return meta["step"], recipe


def _train(
    config: TrainConfig, folder: Path, data: ImageDataset | DomainPair, device: torch.device, resume: bool
) -> TrainResult:
    step, recipe = _start(config, folder, data, device, resume)
    if resume:
        run.rewind_metrics(folder, step)
    else:
        _save(folder, step, config, recipe)
    run.write_config(folder, config)

    first_position, seconds = recipe.position, 0.0
    losses: list[dict[str, Tensor]] = []  # of the steps since the last log, still on the device
    with Interruption() as interruption, closing(Progress(step, config.steps, config.batch_size)) as progress:
        started, position = time.perf_counter(), recipe.position
        while step < config.steps:
            losses.append(recipe.advance(step))
            step += 1
            stops = step == config.steps or interruption.requested
            saves = stops or step % config.save_every == 0
            if not saves and step % config.log_every:
                continue
            means = mean_losses(losses, step)
            elapsed = time.perf_counter() - started
            rate = (recipe.position - position) / elapsed
            run.append_metrics(folder, {"step": step, "losses": means, "images_per_second": round(rate, 1)})
            progress.update(step, means)
            losses.clear()
            seconds += elapsed
            if saves:
                _save(folder, step, config, recipe)
                save_grid(recipe.sample(_GRID, config.seed), folder / "samples" / f"step_{step:06d}.png")
            if stops:
                break
            started, position = time.perf_counter(), recipe.position

    interrupted = step < config.steps
    images = recipe.position - first_position
    evaluation = None if interrupted else run.finish_run(folder, config, recipe)
    return TrainResult(folder, step, interrupted, images / seconds if seconds else 0.0, evaluation)


def _trace(config: TrainConfig, folder: Path, data: ImageDataset | DomainPair, device: torch.device, step: int) -> str:
    """The origin of a value that is not finite at `step`."""
    first, recipe = _start(config, folder, data, device, resume=True)
    return f"{trace(recipe, first, step)}; the checkpoint of step {first} is kept"


def choose_device(name: str) -> torch.device:
    """The device "auto", "cpu" or "cuda". Raises UsageError if there is no GPU for "cuda"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda, but PyTorch finds no GPU")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def mean_losses(losses: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """Mean of each loss over the last steps up to `step`."""
    means = {}
    for name in sorted({name for report in losses for name in report}):
        steps = [step - len(losses) + 1 + offset for offset, report in enumerate(losses) if name in report]
        values = torch.stack([report[name] for report in losses if name in report]).tolist()
        for at, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                raise NotFiniteError(f"{name} is {value}", at)
        means[name] = sum(values) / len(values)
    return means


def _save(folder: Path, step: int, config: TrainConfig, recipe: Recipe) -> None:
    recipe.finish_average()
    tensors = recipe.tensors()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NotFiniteError(f"{name} is not finite", step)
    model = {"name": recipe.model_name, "options": recipe.model_options, "averaged": recipe.averaged}
    if recipe.class_names is not None:
        model["class_names"] = recipe.class_names
    meta = {"fastgen": __version__, "config": config.to_json(), "model": model, "position": recipe.position}
    checkpoint.save_checkpoint(folder, step, tensors, meta)


def _check_same_data(stored: Any, recipe: Recipe) -> None:
    """Raises DataError if what a model takes from the data (channels, classes, words) has changed."""
    stored = stored if isinstance(stored, dict) else {}
    check_classes(stored.get("class_names"), recipe.sources[0], recipe.config.data)
    options = json.loads(json.dumps(recipe.model_options))  # lists, as they are stored
    before = with_current_names(config_class(recipe.model_name), stored.get("options") or options)
    for name, value in before.items():
        if options.get(name) != value:
            raise DataError(f"{recipe.config.data} is not what the run learned from: {name} of its model would change")


def _check_same_run(stored: TrainConfig, config: TrainConfig) -> None:
    if stored.system != config.system:
        raise UsageError(f"the run is of system {stored.system}, not {config.system}")
    for field in dataclasses.fields(config):
        before, now = getattr(stored, field.name), getattr(config, field.name)
        if before != now and field.name not in config.resumable:
            raise UsageError(f"{field.name} of a run cannot change: it is {before!r}, not {now!r}")
