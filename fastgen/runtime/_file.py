"""Writes plan files. docs/plan-format.md describes the format, csrc/plan reads and checks it."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

import numpy as np

from fastgen.runtime._steps import Precision, Step

MAGIC, VERSION = b"fgplan\r\n", 2
HEADER = struct.Struct("<8sII5qd")  # magic, version, checksum, size, steps, records, weights, precision, error
RECORD = struct.Struct("<24s5q")  # kind, size, number of inputs, the size of what it computes
READ = struct.Struct("<4q")
_CHECKSUMMED = 16  # the checksum is that of the bytes from here on


def encode(steps: Sequence[Step], *, precision: Precision = Precision.float32, error: float = math.nan) -> bytes:
    """The bytes of a plan file. error: the relative error measured for the plan; NaN if it was not measured."""
    weights = _Weights()
    records = b"".join(_record(step, weights) for step in steps)
    body = records + b"".join(weights.arrays)
    sizes = (HEADER.size + len(body), len(steps), len(records), weights.size)
    header = HEADER.pack(MAGIC, VERSION, 0, *sizes, precision, error)
    checksum = zlib.crc32(header[_CHECKSUMMED:] + body)
    return HEADER.pack(MAGIC, VERSION, checksum, *sizes, precision, error) + body


class _Weights:
    def __init__(self) -> None:
        self.arrays: list[bytes] = []
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        """Stores the array as float32 and returns its offset."""
        self.arrays.append(np.ascontiguousarray(array, "<f4").tobytes())
        self.size += len(self.arrays[-1])
        return self.size - len(self.arrays[-1])


def _record(step: Step, weights: _Weights) -> bytes:
    numbers = [number for each in fields(step)[2:] for number in _numbers(each, step, weights)]
    own = struct.pack("<" + "".join("d" if isinstance(number, float) else "q" for number in numbers), *numbers)
    reads = b"".join(READ.pack(read.value, *read.size) for read in step.inputs)
    size = RECORD.size + len(reads) + len(own)
    return RECORD.pack(step.kind.encode(), size, len(step.inputs), *step.size) + reads + own


def _numbers(field: Field, owner: Any, weights: _Weights) -> Iterator[int | float]:
    """The file's representation of a field: float64 if the field is annotated as float, int64 otherwise."""
    value = getattr(owner, field.name)
    if is_dataclass(value):
        for each in fields(value):
            yield from _numbers(each, value, weights)
    elif value is None or isinstance(value, np.ndarray):
        yield from (-1 if value is None else weights.add(value), Precision.float32, -1)  # offset, type, no scales
    elif field.type == "float":
        yield float(value)
    else:
        yield from map(int, value if isinstance(value, tuple) else (value,))
