"""Writes plan files: the format of csrc/plan/plan.h, which reads and checks them."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

_MAGIC, _VERSION = b"fgplan\r\n", 1
_HEADER = struct.Struct("<8sII12q")
_STEP = struct.Struct("<30q2d")
_KINDS = (
    "conv", "conv_transpose", "pointwise", "concat", "input", "output", "embedding", "add", "mul", "narrow", "reshape",
    "avg_pool", "max_pool", "upsample_nearest", "upsample_bilinear", "pixel_shuffle",
)  # fmt: skip
_NORMS = ("none", "affine", "batch", "instance", "group")
_ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu")
Size = tuple[int, int, int]  # channels, height, width of an image


@dataclass
class Step:
    """One step; see struct Step in csrc/plan/plan.h. Value 0 is the network's input, value i + 1 the output of step
    i."""

    kind: str
    x: int
    input: Size
    output: Size
    residual: int = -1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    reflect: bool = False
    norm: Literal["none", "affine", "batch", "instance", "group"] = "none"
    num_groups: int = 1
    activation: str = "identity"
    eps: float = 1e-5
    negative_slope: float = 0.01
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    norm_weight: np.ndarray | None = None
    norm_bias: np.ndarray | None = None
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    algorithm: list[int] = field(default_factory=lambda: [-1, -1])  # for few images and for many


def encode(
    steps: list[Step], input_shape: tuple[int, ...], output_shape: tuple[int, ...], *, bfloat16: bool = False
) -> bytes:
    """The bytes of a plan file. Shapes, of the first input and the last output: (C,), (C, H, W), () of labels and
    numbers."""
    values: list[np.ndarray] = []
    count = 0

    def offset(value: np.ndarray | None) -> int:
        nonlocal count
        if value is None:
            return -1
        values.append(np.ascontiguousarray(value, "<f4").reshape(-1))
        count += values[-1].size
        return count - values[-1].size

    records = [
        _STEP.pack(
            _KINDS.index(s.kind), s.x, s.residual, *s.input, *s.output, *s.kernel, *s.stride, *s.padding, *s.dilation,
            s.groups, s.reflect, _NORMS.index(s.norm), s.num_groups, _ACTIVATIONS.index(s.activation),
            offset(s.weight), offset(s.bias), offset(s.norm_weight), offset(s.norm_bias), offset(s.mean), offset(s.var),
            *s.algorithm, s.eps, s.negative_slope,
        )
        for s in steps
    ]  # fmt: skip
    body = b"".join([*records, *(value.tobytes() for value in values)])
    sizes = (len(steps), count, bfloat16, *_end(input_shape), *_end(output_shape))
    header = _HEADER.pack(_MAGIC, _VERSION, 0, _HEADER.size + len(body), *sizes)
    checksum = zlib.crc32(header[16:] + body)
    return _HEADER.pack(_MAGIC, _VERSION, checksum, _HEADER.size + len(body), *sizes) + body


def _end(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    return (len(shape), *(*shape, 1, 1, 1)[:3])  # type: ignore[return-value]
