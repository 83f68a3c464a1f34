"""The fastest implementations by measurement: for convolutions by shape, precision and chip (`fastgen.tune`); for
memory-bound ops, which of the two GPU tiers by chip (`make gpu`).

Each chip has a JSON file of these choices: one may ship with fastgen, and one in the user's cache folder takes
precedence. Where no file has an entry, the rules of `_rules` decide.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen._build import cache
from fastgen.ops import _memo, _tiers
from fastgen.ops._question import Choice, Question

FORMAT = 2  # of the files; files of other formats are ignored
KNOWN = ("torch", *(name for name in _tiers.TIERS if name != "reference"))  # what a file may choose
SHIPPED = Path(__file__).parent / "choices"
FOLDER = "choices"  # in the cache folder
_log = logging.getLogger("fastgen")
_tables: dict[str, Mapping[str, Entry]] = {}  # device -> str(question), or the name of an op -> what was measured


class Entry(NamedTuple):
    """A file's entry for a question or an op."""

    chosen: str  # str() of a Choice
    milliseconds: Mapping[str, float]  # measured medians, by implementation


def measured(question: Question) -> Choice | None:
    """The implementation that was measured fastest on this chip, with the tile for a Triton kernel; None if nothing was
    measured or the fastest cannot run."""
    table = _table(question.device)
    entry = table.get(str(question)) if table else None
    if entry is None:
        return None
    implementation = Choice.parse(entry.chosen).implementation
    if implementation != "torch" and _tiers.unavailable(implementation, question.device, question.dtype):
        return None
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in entry.milliseconds.items())
    return Choice.parse(entry.chosen, f"measured on this chip: {times}" if times else "measured on this chip")


def faster_tier(op: str, device: str) -> str | None:
    """The GPU tier that was measured faster for a memory-bound op (`make gpu`); None if nothing was measured."""
    entry = _table(device).get(op)
    return None if entry is None else entry.chosen


def _table(device: str) -> Mapping[str, Entry]:
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _read_all(device)
    return table


def forget() -> None:
    """Drops what was read and decided: a file was written, or something that is part of a chip's name has changed."""
    _tables.clear()
    _memo.forget()


def chip(device: str) -> str | None:
    """The name of a device's file, made of what affects speed there; None where measurements are not used.

    On a CPU the name has the processor, the instruction sets of PyTorch and of fastgen, and the number of threads.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    elif device == "cpu" and not _tiers.ON_CPU:
        isa, amx, winograd = (os.environ.get(f"FASTGEN_{name}", "") for name in ("CPU_ISA", "AMX", "WINOGRAD"))
        limits = f"{isa and f' at most {isa}'}{amx and f' amx {amx}'}{winograd and f' winograd {winograd}'}"
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{_processor()} {capability}{limits} {torch.get_num_threads()} threads"
    else:
        return None
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _read_all(device: str) -> Mapping[str, Entry]:
    name = None if os.environ.get("FASTGEN_CHOICES") == "0" else chip(device)
    if name is None:
        return {}
    files = (SHIPPED / f"{name}.json", *cache.cached(f"{FOLDER}/{name}.json"))
    read = ((question, entry) for file in files for question, entry in (_read(file) or {}).items())
    return {question: Entry(entry["chosen"], entry.get("ms", {})) for question, entry in read}


def _read(file: Path) -> dict[str, dict] | None:
    """The entries of a file; {} if the file does not exist; None, with a warning, if it cannot be used."""
    try:
        document = json.loads(file.read_text())
        return _checked(document)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(f"{file} is ignored: {error}")
        return None


def _checked(document: Any) -> dict[str, dict]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        version = document.get("format") if isinstance(document, dict) else None
        raise ValueError(f"its format is {version}, but this fastgen reads format {FORMAT}")
    entries = document.get("choices")
    if not isinstance(entries, dict):
        raise ValueError("it contains no choices")
    for question, entry in entries.items():
        chosen = entry.get("chosen") if isinstance(entry, dict) else None
        if not isinstance(chosen, str) or Choice.parse(chosen).implementation not in KNOWN:
            raise ValueError(f"it names an unknown implementation {chosen!r} for {question}")
    return entries


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def save(name: str, chosen: Mapping[str, tuple[str, Mapping[str, float]]], folder: Path | None = None) -> Path:
    """Adds choices, question -> (implementation, medians in milliseconds), to a chip's file and returns its path.

    folder: where the file is; by default in the user's cache. Entries for other questions stay. A file that cannot be
    used is kept under another name. Raises FastgenError if the file cannot be written.
    """
    with cache.locked() as kept:
        folder = folder or kept / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.json"
        entries = _read(file)
        if entries is None:
            os.replace(file, f"{file}.old")
        entries = dict(entries or {})
        for question, (implementation, medians) in chosen.items():
            rounded = {candidate: float(f"{ms:.4g}") for candidate, ms in medians.items() if math.isfinite(ms)}
            entries[question] = {"chosen": implementation, "ms": rounded, "torch": torch.__version__}
        lines = ",\n".join(f"{json.dumps(question)}: {json.dumps(entries[question])}" for question in sorted(entries))
        written = Path(f"{file}.tmp")  # no other process writes it: this one holds the lock
        written.write_text(f'{{"format": {FORMAT}, "choices": {{\n{lines}\n}}}}\n')
        os.replace(written, file)
    forget()
    return file
