"""What was measured fastest: of a convolution which implementation, by shape, precision and chip (`fastgen.tune`), and
of the ops that memory bounds which of a GPU's two, by chip (`make gpu`).

A chip has a JSON file of such choices among those that fastgen brings, and one in the user's cache folder, whose
choices come first. What no file holds is answered by the rules of `_rules`.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen._build import cache
from fastgen.ops import _dispatch, _memory
from fastgen.ops._layout import Like

FORMAT = 1  # of the files; those of another are ignored
SHIPPED = Path(__file__).parent / "choices"
FOLDER = "choices"  # in the cache folder
_FLAGS = {"forward": "batch_stats", "weight_grad": "channels_last_images"}
_log = logging.getLogger("fastgen")
_tables: dict[str, Mapping[str, str]] = {}  # device -> question, or name of an op -> implementation


class Question(NamedTuple):
    """What is to be computed; its str() is its key in a file."""

    what: str  # "forward", "input_grad" or "weight_grad"
    geometry: tuple  # Geometry's fields
    x: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: torch.dtype
    device: str
    channels_last: bool  # the weight
    flag: bool  # see _FLAGS

    def __str__(self) -> str:
        stride, padding, output_padding, groups, dilation, reflect = self.geometry
        dtype = str(self.dtype).removeprefix("torch.")
        if self.device != "cpu" and dtype == "float32" and _in_tf32():
            dtype = "tf32"
        words = [
            self.what,
            "conv2d" if output_padding is None else "conv_transpose2d",
            _by(self.x),
            "by",
            _by(self.weight),
        ]
        words += [dtype, *["channels_last"] * self.channels_last, "stride", _by(stride), "padding", _by(padding)]
        words += ["reflect"] * reflect + ([] if output_padding is None else ["output_padding", _by(output_padding)])
        words += ["dilation", _by(dilation), "groups", str(groups), *[_FLAGS.get(self.what, "")] * self.flag]
        return " ".join(words)


def _in_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def best(what: str, geometry: tuple, x: Sequence[int], weight: Like, flag: bool, guess: bool) -> str | None:
    """The implementation that was measured fastest, for a GPU's Triton kernels with the tile ("triton 64x64x64x4x3").

    Where nothing was measured, or what was cannot run here, `guess` decides: "own", which is the one that auto takes.
    None is PyTorch's convolution. A graph that is compiled for sizes that vary follows the guess.
    """
    found = None
    if not torch.compiler.is_compiling() or _is_static(*x, *weight.shape):
        question = (tuple(x), tuple(weight.shape), weight.dtype, str(weight.device), weight.channels_last, flag)
        found = _measured(guess, what, tuple(geometry), *question)
    found = found or ("own" if guess else "reference")
    return None if found == "reference" else found


def _is_static(*sizes: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # here: it takes long to import

    return all(has_static_value(size) for size in sizes)


@_memory.constant
def _measured(guess: bool, *parts: Any) -> str | None:
    question = Question(*parts)
    if (recorder := _memory.recorder.get()) is not None:
        recorder[question] = guess
    table = _table(question.device)
    found = table.get(str(question)) if table else None
    able = found and _dispatch.why_not("conv2d_norm_act", found.split()[0], question.device, question.dtype) is None
    return found if able else None


def faster_tier(op: str, device: str) -> str | None:
    """Which of a GPU's two was measured faster for an op that memory bounds (`make gpu`); None where nothing was."""
    return _table(device).get(op)


def _table(device: str) -> Mapping[str, str]:
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _read_all(device)
    return table


@contextlib.contextmanager
def recorded() -> Iterator[dict[Question, bool]]:
    """Within the context the questions that this thread asks are written down, each with the rules' guess."""
    asked: dict[Question, bool] = {}
    with _memory.recorder.set_to(asked):
        yield asked


def forget() -> None:
    """Files are read and questions answered anew: one was written, or what a chip's name says has changed."""
    _tables.clear()
    _memory.forget()


def chip(device: str) -> str | None:
    """The name of a device's file, after what decides there; None where nothing is chosen by measurement.

    On a CPU that is the processor, the instruction sets of PyTorch and of fastgen, and the number of threads.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    elif device == "cpu" and not (_dispatch.INTERPRETED or _dispatch.CUDA_ON_CPU):
        isa, winograd = os.environ.get("FASTGEN_CPU_ISA", ""), os.environ.get("FASTGEN_WINOGRAD", "")
        limits = f"{isa and f' at most {isa}'}{winograd and f' winograd {winograd}'}"
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{_processor()} {capability}{limits} {torch.get_num_threads()} threads"
    else:
        return None
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _read_all(device: str) -> Mapping[str, str]:
    name = None if os.environ.get("FASTGEN_CHOICES") == "0" else chip(device)
    if name is None:
        return {}
    files = (SHIPPED / f"{name}.json", *cache.cached(f"{FOLDER}/{name}.json"))
    return {question: entry["chosen"] for file in files for question, entry in (_read(file) or {}).items()}


def _read(file: Path) -> dict[str, dict] | None:
    """The entries of a file, {} if there is none; None, and a warning, if it cannot be used."""
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
        found = document.get("format") if isinstance(document, dict) else None
        raise ValueError(f"its format is {found}, this fastgen reads format {FORMAT}")
    entries = document.get("choices")
    if not isinstance(entries, dict):
        raise ValueError("it holds no choices")
    for question, entry in entries.items():
        chosen = entry.get("chosen") if isinstance(entry, dict) else None
        if not isinstance(chosen, str) or chosen.partition(" ")[0] not in _dispatch.IMPLEMENTATIONS:
            raise ValueError(f"there is no implementation {chosen!r}, which it names for {question}")
    return entries


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def save(name: str, chosen: Mapping[str, tuple[str, Mapping[str, float]]], folder: Path | None = None) -> Path:
    """Adds choices to a chip's file, question -> (implementation, medians in milliseconds), and returns the file.

    folder: where, the user's cache unless given. What the file holds of other questions stays; one that cannot be used
    is kept under another name. Raises FastgenError where it cannot be written.
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
        written = Path(f"{file}.tmp")  # nobody else writes it: the lock is ours
        written.write_text(f'{{"format": {FORMAT}, "choices": {{\n{lines}\n}}}}\n')
        os.replace(written, file)
    forget()
    return file
