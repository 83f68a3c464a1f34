"""A run folder: config.json, metrics.jsonl, a checkpoint, samples/, samples.png, loss.png, evaluation.json,
report.html."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data import save_grid
from fastgen.errors import CheckpointError, DataError, FastgenError, UsageError, naming
from fastgen.inference import fusion_report
from fastgen.models import capabilities, create_model
from fastgen.training import checkpoint
from fastgen.training.config import TrainConfig, config_from_json
from fastgen.training.evaluation import Evaluation, evaluate_model
from fastgen.training.plot import plot_losses
from fastgen.training.recipes.base import Recipe, load_module, plain_defaults
from fastgen.training.report import write_report

_log = logging.getLogger(__name__)
_MAX_SAMPLED = 2**28  # values of the images that `sample` draws at once: 1 GiB


@contextlib.contextmanager
def claim(folder: Path, *, new: bool) -> Iterator[None]:
    """Locks a run's folder against other processes that train; creates it first if it is `new`.

    Raises:
        FastgenError: the path is a file, a folder that is not empty (if `new`), or one that another process trains in.
        OSError: the folder cannot be created or written.
    """
    if new:
        _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":  # Windows has no lock on a folder
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process
        except BlockingIOError:
            raise FastgenError(f"another process trains in {folder}") from None
        except OSError as error:  # a file system without locks
            _log.info("%s cannot be locked: %s", folder, error)
        if new:
            _check_empty(folder)
        yield
    finally:
        os.close(descriptor)


def _check_empty(folder: Path) -> None:
    if folder.is_file():
        raise FastgenError(f"{folder} is a file: a run needs a folder of its own")
    if (folder / checkpoint.NAME).exists():
        raise FastgenError(f"{folder} already holds a run: continue it with --resume, or choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FastgenError(f"{folder} is not empty: a run needs a folder of its own")


def write_config(folder: Path, config: TrainConfig) -> None:
    checkpoint.write_atomically(folder / "config.json", json.dumps(config.to_json(), indent=2).encode())


def read_config(folder: Path) -> TrainConfig:
    """The settings that the folder's checkpoint was trained with.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    return _config_of(folder, checkpoint.load_meta(folder))


def _config_of(folder: Path, meta: dict[str, Any]) -> TrainConfig:
    values = meta.get("config")
    try:
        return config_from_json(values if isinstance(values, dict) else {})
    except UsageError as error:
        raise CheckpointError(f"{folder / checkpoint.NAME} is damaged: {error}") from error


def load_model(folder: str | Path) -> Any:
    """The model of a run folder, with its averaged weights, in eval mode on the CPU.

    Runs no code from the folder, and takes no more memory than its tensors need.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one whose tensors do not fit the model that it names.
    """
    return _load(Path(folder))[1]


def _load(folder: Path) -> tuple[dict[str, Any], Any]:
    """The checkpoint's description and its model, of one step."""
    meta, tensors = checkpoint.load(folder)
    spec: Any = meta.get("model")
    try:
        with plain_defaults("meta"):  # so that the sizes in a hostile file cost nothing
            model = create_model(spec["name"], **spec["options"])
        for part in spec["averaged"]:
            model.get_submodule(part)
    except (UsageError, AttributeError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / checkpoint.NAME} is damaged: it describes no known model ({error})"
        ) from error
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    weights |= {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
    load_module(model, weights, assign=True)
    return meta, model.requires_grad_(False).eval()


def sample(model: Any, n: int, seed: int, **conditions: Any) -> Tensor:
    """`n` images of the model, drawn with the given `labels` or `captions`; the same seed gives the same images on the
    same machine."""
    if not capabilities(model).draws:
        raise UsageError(f"a {type(model).__name__} does not draw from noise: give it images with `fastgen translate`")
    _check_count(model, n)
    check_seed(seed)
    return model.sample(n, generator=torch.Generator().manual_seed(seed), **conditions)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed must be between 0 and 2^63, not {seed}")


def _check_count(model: Any, n: int) -> None:
    declared = capabilities(model)
    channels = declared.channels or max((before for before, _ in declared.directions.values()), default=1)
    most = max(1, _MAX_SAMPLED // (channels * (declared.image_size or 1) ** 2))
    if not 1 <= n <= most:
        raise UsageError(f"n must be between 1 and {most} for images of this size, not {n}")


def evaluate(folder: str | Path, n: int = 1000, seed: int = 0) -> Evaluation:
    """Measures a run's model on `n` samples; writes evaluation.json and rewrites report.html and loss.png.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        DataError: the data set cannot be loaded, or torchmetrics is not installed.
    """
    folder = Path(folder)
    meta, model = _load(folder)
    config = _config_of(folder, meta)
    _check_count(model, n)
    check_seed(seed)
    result = evaluate_model(model, config, n, seed, meta["model"].get("class_names"))
    document = {"data": config.data, "step": meta["step"], "seed": seed, "n": n, **result.to_json()}
    checkpoint.write_atomically(folder / "evaluation.json", json.dumps(document, indent=2).encode())
    _write_report(folder, config, meta["step"], model, result)
    return result


def finish_run(folder: Path, config: TrainConfig, recipe: Recipe) -> Evaluation | None:
    """Writes the results of a complete run: samples.png, loss.png, evaluation.json, report.html."""
    save_grid(recipe.sample(100, config.seed), folder / "samples.png")
    try:
        return evaluate(folder)
    except DataError as error:
        _log.warning("no evaluation: %s", error)
        meta, model = _load(folder)
        _write_report(folder, config, meta["step"], model, None)
        return None


def _write_report(folder: Path, config: TrainConfig, step: int, model: Any, result: Evaluation | None) -> None:
    """Writes report.html and loss.png."""
    records = read_metrics(folder)
    plot = plot_losses(records)
    if plot is not None:
        checkpoint.write_atomically(folder / "loss.png", plot.png)
    write_report(folder, config, step, records, result, str(fusion_report(model)), plot and plot.svg)


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    path = folder / "metrics.jsonl"
    with naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; lines that are not records, such as one cut short by a kill, are left out."""
    records = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step, losses = (record.get("step"), record.get("losses")) if isinstance(record, dict) else (None, None)
        if type(step) is not int or not 0 <= step < 2**63 or not isinstance(losses, dict):
            continue
        if all(isinstance(value, float) and math.isfinite(value) for value in losses.values()):
            records.append(record)
    return records


def rewind_metrics(folder: Path, step: int) -> None:
    """Drops the records after `step`, where a resumed run continues."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
    checkpoint.write_atomically(folder / "metrics.jsonl", "".join(kept).encode())
