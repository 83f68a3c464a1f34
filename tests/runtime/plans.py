"""Two small plans that together have every kind of step, and the parts of their files."""

import struct
import zlib

import numpy as np

from fastgen.runtime import Plan
from fastgen.runtime._file import HEADER, RECORD, encode
from fastgen.runtime._steps import (
    Activation,
    Add,
    AvgPool,
    Concat,
    Convolution,
    Embedding,
    Epilogue,
    Geometry,
    Input,
    MaxPool,
    Mul,
    Narrow,
    Norm,
    NormAct,
    Output,
    PixelShuffle,
    Precision,
    Read,
    Reshape,
    UpsampleBilinear,
    UpsampleNearest,
)


def small(precision: Precision = Precision.float32) -> bytes:
    """(3, 1, 1) -> transposed convolution, instance norm, leaky_relu -> convolution + residual, affine norm, tanh: (2,
    4, 4)."""
    generator = np.random.default_rng(0)

    def floats(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    steps = [
        Input([], (3, 1, 1), 3),
        Convolution(
            [Read(0, (3, 1, 1))], (2, 4, 4), Geometry((4, 4), transposed=True), floats(3, 2, 4, 4), floats(2),
            epilogue=Epilogue(Norm.instance, activation=Activation.leaky_relu, negative_slope=0.2),
        ),
        Convolution(
            [Read(1, (2, 4, 4)), Read(1, (2, 4, 4))], (2, 4, 4), Geometry((3, 3), padding=(1, 1), reflect=True),
            floats(2, 2, 3, 3),
            epilogue=Epilogue(Norm.affine, mean=floats(2), var=floats(2) ** 2 + 1, activation=Activation.tanh),
        ),
        Concat([Read(1, (2, 4, 4)), Read(2, (2, 4, 4))], (4, 4, 4)),
        NormAct([Read(3, (4, 4, 4))], (4, 4, 4),
                Epilogue(Norm.group, num_groups=2, weight=floats(4), activation=Activation.silu)),
        Output([Read(4, (4, 4, 4))], (4, 4, 4), 3),
    ]  # fmt: skip
    return encode(steps, precision=precision)


def several(precision: Precision = Precision.float32) -> bytes:
    """(3, 4, 4), labels below 5 and (2, 1, 1) -> all kinds of steps that `small` does not have: (16), (2, 8, 8) and one
    number."""
    table = np.random.default_rng(0).random((5, 16), np.float32)
    steps = [
        Input([], (3, 4, 4), 3),
        Input([], (1, 1, 1), 0),
        Input([], (2, 1, 1), 3),
        Embedding([Read(1, (1, 1, 1))], (16, 1, 1), 5, table),
        Reshape([Read(3, (16, 1, 1))], (1, 4, 4)),
        Concat([Read(0, (3, 4, 4)), Read(4, (1, 4, 4))], (4, 4, 4)),
        Mul([Read(5, (4, 4, 4)), Read(4, (1, 4, 4))], (4, 4, 4)),
        UpsampleBilinear([Read(6, (4, 4, 4))], (4, 5, 7), align_corners=True),
        UpsampleNearest([Read(7, (4, 5, 7))], (4, 4, 4)),
        MaxPool([Read(8, (4, 4, 4))], (4, 4, 4), (3, 3), (1, 1), (1, 1)),
        Narrow([Read(9, (4, 4, 4))], (2, 4, 4), 1),
        Add([Read(10, (2, 4, 4)), Read(2, (2, 1, 1))], (2, 4, 4)),
        Output([Read(3, (16, 1, 1))], (16, 1, 1), 1),
        Concat([Read(11, (2, 4, 4)), Read(10, (2, 4, 4)), Read(9, (4, 4, 4))], (8, 4, 4)),
        PixelShuffle([Read(13, (8, 4, 4))], (2, 8, 8)),
        Output([Read(14, (2, 8, 8))], (2, 8, 8), 3),
        Narrow([Read(14, (2, 8, 8))], (1, 8, 8), 0),
        AvgPool([Read(16, (1, 8, 8))], (1, 1, 1), (8, 8), (8, 8), count_include_pad=True),
        Output([Read(17, (1, 1, 1))], (1, 1, 1), 0),
    ]
    return encode(steps, precision=precision)


PLANS = {"small": small, "several": several}


def example_inputs(plan: Plan, n: int) -> list[np.ndarray]:
    """Inputs for a plan: ones, and labels of class 0."""
    return [
        np.ones((n, *end.shape), np.float32) if end.classes is None else np.zeros(n, np.int64) for end in plan.inputs
    ]


def shapes(outputs) -> list[tuple[int, ...]]:
    return [out.shape for out in (outputs if isinstance(outputs, tuple) else (outputs,))]


def sealed(data: bytes) -> bytes:
    """The bytes with the checksum that they should have."""
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


def records(data: bytes) -> list[tuple[int, bytes]]:
    """The position of each step's record, and its kind."""
    found, at = [], HEADER.size
    for _ in range(HEADER.unpack_from(data)[4]):
        kind, size, *_ = RECORD.unpack_from(data, at)
        found.append((at, kind))
        at += size
    return found
