"""Runs programs in separate Python processes that find this checkout's packages."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGS = 600  # seconds after which a process counts as hanging: generous, for a loaded machine


def run_python(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs the program and returns its output. If it fails, its stderr is the message."""
    (process,) = start([arguments], code, environment, flags)
    return ended(process)


def run_ranks(code: str, count: int, *arguments: object) -> None:
    """Runs the program in `count` processes at once, each with its rank as the first argument."""
    processes = start([(rank, *arguments) for rank in range(count)], code)
    try:
        for process in processes:
            ended(process)
    finally:
        for process in processes:
            process.kill()


def start(
    of_each: list[tuple], code: str, environment=None, flags: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, *flags, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in of_each
    ]


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
