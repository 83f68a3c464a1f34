import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import tyro

from fastgen.cli.evaluation import print_evaluation
from fastgen.training.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class _Options(Generic[Config]):
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run folder: new or empty, or with --resume the folder of an earlier run."""
    resume: bool = False
    """Continue from the run folder's checkpoint, with its settings except for those given here."""


def run_train(kind: type[TrainConfig], arguments: list[str]) -> int:
    """`fastgen train`: trains, then prints a summary; returns the exit code."""
    for old, name in kind.renamed.items():
        arguments = [re.sub(f"^--{old}(?=$|=)", "--" + name.replace("_", "-"), argument) for argument in arguments]
    options = _parse(kind(), arguments)
    if options.resume:
        from fastgen.training.run import read_config

        stored = read_config(options.out)
        if isinstance(stored, kind):  # the loop refuses another system's run
            options = _parse(stored, arguments)

    from fastgen import ops, training

    training.keep_freed_memory()
    result = training.train(options.config, options.out, resume=options.resume)
    folder = result.folder
    if result.interrupted:
        print(f"stopped at step {result.step}; the checkpoint is in {folder}", file=sys.stderr)
        print(f"continue with: fastgen train {kind.system} --out {shlex.quote(str(folder))} --resume", file=sys.stderr)
        return 130
    print(f"trained {kind.system} to step {result.step} at {result.images_per_second:.0f} images/s")
    print(f"  samples     {folder / 'samples.png'}  (during training: {folder / 'samples'})")
    print(f"  report      {folder / 'report.html'}")
    plot = folder / "loss.png"  # needs matplotlib
    print(f"  losses      {folder / 'metrics.jsonl'}" + (f"  (drawn: {plot})" if plot.exists() else ""))
    print(f"  checkpoint  {folder / 'checkpoint.json'}")
    if result.evaluation is not None:
        print_evaluation(result.evaluation)
        print(f"  saved in    {folder / 'evaluation.json'}")
    used = ops.implementations_used()
    for op, calls in used.items():
        print(f"  {op} ran on " + ", ".join(f"{impl} ({count} calls)" for impl, count in calls.items()))
    if used:
        print('  ("Who computed it" in README.md explains these words)')
    return 0


def _parse(config: TrainConfig, arguments: list[str]) -> _Options[TrainConfig]:
    """Parses the arguments. Values are checked here, not by tyro, which would draw a box around the one line of an
    error."""
    kind = type(config)
    unchecked = type(kind.__name__, (kind,), {"__post_init__": lambda self: None, "__module__": kind.__module__})
    options = tyro.cli(
        _Options[unchecked],  # type: ignore[valid-type]
        prog=f"fastgen train {kind.system}",
        description="Train on a data set and write a run folder: settings, metrics, checkpoint, samples, plots. "
        "The defaults are a recipe that works.",
        args=arguments,
        default=_Options(unchecked(**vars(config)), out=tyro.MISSING),
    )
    return replace(options, config=kind(**vars(options.config)))
