"""The document of a session on a GPU: its stages, their rows, and how a later session continues it."""

import datetime
import json
import operator
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastgen.inference._tune import milliseconds as once

Clock = Callable[[Callable[[], object]], float]


class OutOfTimeError(BaseException):
    """Raised in the running code when time is up. Not an Exception, which would count as a failure of the peer."""


def out_of_time(*_: object) -> None:
    raise OutOfTimeError("time is up")


def milliseconds(call, scratch: torch.Tensor, rounds: int = 20) -> float:
    """The median time of rounds, each after a write that is larger than the L2 cache."""
    for _ in range(5):
        call()
    return statistics.median(once(call, scratch) for _ in range(rounds))


def tier_of(peer: str) -> str:
    """The `impl` of a contender such as "fastgen triton"; "auto" for PyTorch."""
    return peer.split()[-1] if "fastgen" in peer else "auto"


def output_of(*command: str) -> str:
    """The output of a command; "unknown" if it fails (such as git outside of a repository) or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return "unknown" if done.returncode else done.stdout.strip()


def environment() -> dict:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(),
        "commit": output_of("git", "rev-parse", "HEAD"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def table(document: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    lines = [
        f"{about}. cudnn.benchmark, cold L2 cache, medians. Parity: {'; '.join(document['wrong']) or 'all right'}. "
        f"Tiers: {document['tiers']}. Sanitizer: {'; '.join(document['sanitizer']) or 'nothing found'}. "
        f"Left out for lack of time: {', '.join(document['left_out']) or 'nothing'}. "
        f"Failed: {'; '.join(document['failed']) or 'nothing'}. An H200's floor: of fastgen's passes by the shapes, "
        "and of all that Triton's launches move and multiply.",
        "", "| case | batch | precision | pass | peer | ms | floor, ms | as launched, ms | right |", "|---" * 9 + "|",
    ]  # fmt: skip
    for row in document["rows"]:
        if row["ms"] is None:
            end = f"{row['failed']} | | | no"
        else:
            launched = f"{row['launched_ms_h200']:.3f}" if "launched_ms_h200" in row else ""
            end = f"{row['ms']:.3f} | {row['floor_ms_h200']:.3f} | {launched} | {'yes' if row['correct'] else 'no'}"
        lines.append(f"| {row['case']} | {row['batch']} | {row['dtype'][6:]} | {row['what']} | {row['peer']} | {end} |")
    return "\n".join(lines) + "\n"


_KEY = operator.itemgetter("case", "batch", "dtype", "what", "peer")


def add_rows(document: dict, rows: Iterator[dict]) -> None:
    """Adds rows until one fails; a new row replaces an older one with the same case and peer."""
    for row in rows:
        document["rows"] = [old for old in document["rows"] if _KEY(old) != _KEY(row)] + [row]


def started(file: Path, about: dict) -> dict:
    """The document to continue: the file's if machine and commit are known and the same, else an empty one."""
    before = json.loads(file.read_text()) if file.exists() else {}
    same = before and before["environment"] | {"date": about["date"]} == about and about["commit"] != "unknown"
    kept = before if same else {"wrong": [], "sanitizer": [], "rows": [], "done": []}
    return {**kept, "environment": about, "left_out": [], "failed": []}


def run(document: dict, stages: Iterable[tuple[str, Callable[[dict], None]]], deadline: float, keep: Callable) -> None:
    """Runs the missing stages until the deadline, and keep(document) after each."""
    for name, stage in stages:
        if name in document["done"]:
            continue
        if time.monotonic() > deadline:
            document["left_out"].append(name)
            continue
        try:
            stage(document)
            document["done"].append(name)
        except (Exception, OutOfTimeError) as error:  # sessions on a GPU are rare: measure the rest
            document["failed"].append(f"{name}: {type(error).__name__}: {error}"[:300])
        keep(document)
    keep(document)
