"""The steps of a plan, one class per kind, with the fields of csrc/plan/steps and of docs/plan-format.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np

Size = tuple[int, int, int]  # channels, height, width of an image
HW = tuple[int, int]


class Precision(IntEnum):
    """For a plan: the type of the values between its steps. For a weight: the type in which it is stored."""

    float32, bfloat16, float16, int8, float8_e4m3 = range(5)


class Norm(IntEnum):
    """affine: with the mean and var of the file; batch, instance, group: with statistics of the input."""

    none, affine, batch, instance, group = range(5)


class Activation(IntEnum):
    """fastgen::Activation of csrc/shared/activation.h."""

    identity, relu, leaky_relu, tanh, sigmoid, silu = range(6)


class Read(NamedTuple):
    """A value that a step reads, as an image of `size`, which may be any size with the same number of elements. Step i
    computes value i; in memory its order is (h, w, c)."""

    value: int
    size: Size


@dataclass
class Step:
    """A step: the values that it reads, and the size of the value that it computes. The fields of a kind follow in the
    order of its struct in C++."""

    kind: ClassVar[str]
    inputs: list[Read]
    size: Size


@dataclass
class Input(Step):
    """One of the network's inputs. rank 3: images (N, C, H, W); 1: vectors (N, C); 0: labels (N)."""

    kind = "input"
    rank: int


@dataclass
class Output(Step):
    """One of the network's outputs, in the order (C, H, W). rank: as for an input, but 0 is one number per image."""

    kind = "output"
    rank: int


@dataclass
class Epilogue:
    """The end of a convolution: act(norm(x) + residual). The residual is the second value that the step reads."""

    norm: Norm = Norm.none
    num_groups: int = 1
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float = 1e-5
    activation: Activation = Activation.identity
    negative_slope: float = 0.01


@dataclass
class Geometry:
    """Sizes of a convolution. reflect: the padding mirrors the image instead of being zero."""

    kernel: HW
    stride: HW = (1, 1)
    padding: HW = (0, 0)
    dilation: HW = (1, 1)
    groups: int = 1
    reflect: bool = False
    transposed: bool = False


@dataclass
class Convolution(Step):
    """weight: (oc, ic / groups, kh, kw), transposed (ic, oc / groups, kh, kw). algorithm: of csrc/cpu/algorithm.h, for
    small and for large batches; -1: chosen by the sizes."""

    kind = "convolution"
    geometry: Geometry
    weight: np.ndarray
    bias: np.ndarray | None = None
    algorithm: tuple[int, int] = (-1, -1)
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass
class NormAct(Step):
    """A norm, a residual and an activation that are not part of a convolution."""

    kind = "norm_act"
    epilogue: Epilogue


@dataclass
class Concat(Step):
    """Concatenates all values that it reads along the channels."""

    kind = "concat"


@dataclass
class Narrow(Step):
    """Consecutive channels from `start` on."""

    kind = "narrow"
    start: int


@dataclass
class Embedding(Step):
    """The row of weight (rows, c) for each label."""

    kind = "embedding"
    rows: int
    weight: np.ndarray


@dataclass
class Add(Step):
    """x + y, where sizes of y may be 1."""

    kind = "add"


@dataclass
class Mul(Step):
    """x * y, where sizes of y may be 1."""

    kind = "mul"


@dataclass
class Reshape(Step):
    """The elements in the order (c, h, w), as an image of another size."""

    kind = "reshape"


@dataclass
class AvgPool(Step):
    kind = "avg_pool"
    kernel: HW
    stride: HW
    padding: HW = (0, 0)
    count_include_pad: bool = False


@dataclass
class MaxPool(Step):
    kind = "max_pool"
    kernel: HW
    stride: HW
    padding: HW = (0, 0)
    dilation: HW = (1, 1)


@dataclass
class UpsampleNearest(Step):
    """exact: PyTorch's mode "nearest-exact"."""

    kind = "upsample_nearest"
    exact: bool = False


@dataclass
class UpsampleBilinear(Step):
    kind = "upsample_bilinear"
    align_corners: bool = False


@dataclass
class PixelShuffle(Step):
    """channels_last: the channels of the input are (dy, dx, c) instead of PyTorch's (c, dy, dx)."""

    kind = "pixel_shuffle"
    channels_last: bool = False
