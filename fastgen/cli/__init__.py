"""The command line: parses, calls, prints.

A command imports what it needs inside its function, so that `--help` answers without the seconds that torch takes.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from fastgen import __version__
from fastgen.cli import draw, evaluation, info, pictures, plans, tune
from fastgen.cli.train import run_train
from fastgen.errors import FastgenError, UsageError, out_of_memory, unknown_name
from fastgen.training.config import CONFIGS

_COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": draw.generate,
    "reconstruct": pictures.reconstruct,
    "denoise": pictures.denoise,
    "inpaint": pictures.inpaint,
    "upscale": pictures.upscale,
    "translate": pictures.translate,
    "export": plans.export,
    "evaluate": evaluation.evaluate,
    "bench": plans.bench,
    "tune": tune.tune,
    "info": info.info,
    "build": info.build,
}
_DESCRIPTION = """Fast convolutional image generators in PyTorch.

Start with `fastgen train dcgan --data digits --out runs/demo`,

then draw with `fastgen generate runs/demo --n 64 --seed 7 --out grid.png`.

Each command has its own page: `fastgen generate --help`, `fastgen train dcgan --help`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 (failure), 2 (misuse) or 130 (interrupted). With FASTGEN_DEBUG=1 errors are raised instead.
    """
    # Pillow's warning says nothing new: fastgen either refuses a large image by name or uses it
    warnings.filterwarnings("ignore", "Image size .* exceeds limit of .* pixels")
    for stream in (sys.stdout, sys.stderr):  # a file name may have characters that the terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return 130
    except (UsageError, FastgenError, OSError, RuntimeError, MemoryError) as error:
        expected = isinstance(error, (UsageError, FastgenError, OSError))
        if os.environ.get("FASTGEN_DEBUG") == "1" or not (expected or out_of_memory(error)):
            raise
        if not expected:
            advice = "use a smaller --n, --batch-size or model"
            print(f"fastgen: error: not enough memory: {advice}", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename is not None:
            print(f"fastgen: error: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            print(f"fastgen: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _train() -> None:
    """Train a model on a data set and write a run folder."""


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command == "--version":
        print(f"fastgen {__version__}")
        return 0
    if command and not command.startswith("-") and command not in ("train", *_COMMANDS):
        raise unknown_name("command", command, ("train", *_COMMANDS))
    if command == "train" and rest and not rest[0].startswith("-"):
        if rest[0] not in CONFIGS:
            raise unknown_name("model", rest[0], CONFIGS)
        return run_train(CONFIGS[rest[0]], rest[1:])
    if command == "train":
        pages: dict[str, Any] = {**CONFIGS}
        tyro.extras.subcommand_cli_from_dict(
            pages, prog="fastgen train", description="Train a model on a data set.", args=rest
        )
        return 2
    table = {"train": _train, **_COMMANDS}
    tyro.extras.subcommand_cli_from_dict(table, prog="fastgen", description=_DESCRIPTION, args=arguments)
    return 0
