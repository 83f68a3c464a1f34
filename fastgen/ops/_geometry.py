"""The geometry of a convolution: its sizes, and its adjoint convolution. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastgen.ops._layout import specialize
from fastgen.ops._memo import memoize

HW = tuple[int, int]  # height, width


def for_both_axes(values: Sequence[int]) -> tuple[int, ...]:
    """The values; a single one is for height and width, as in PyTorch's convolutions."""
    return (*values, *values) if len(values) == 1 else tuple(values)


class Geometry(NamedTuple):
    """output_padding is None unless transposed."""

    stride: HW
    padding: HW
    output_padding: HW | None
    groups: int
    dilation: HW
    reflect: bool = False

    @staticmethod
    def of(stride, padding, output_padding, groups, dilation, reflect=False) -> Geometry:
        """From a schema's arguments; in ops for both kinds of convolution an empty output_padding stands for None."""
        stride, padding, output_padding, dilation = map(for_both_axes, (stride, padding, output_padding, dilation))
        return Geometry(stride, padding, output_padding or None, groups, dilation, reflect)

    def specialized(self) -> Geometry:
        """The same with all of its numbers as constants of the graph being compiled."""
        stride, padding, output_padding, dilation = (
            tuple(map(specialize, pair or ()))
            for pair in (self.stride, self.padding, self.output_padding, self.dilation)
        )
        return Geometry.of(stride, padding, output_padding, specialize(self.groups), dilation, self.reflect)

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    def arguments(self) -> tuple:
        """The arguments of the ops for both kinds of convolution."""
        return self.stride, self.padding, self.output_padding or (), self.groups, self.dilation, self.reflect

    def fused(self) -> tuple[str, tuple]:
        """The fused op for this kind of convolution, with its arguments."""
        op = "conv_transpose2d_norm_act" if self.transposed else "conv2d_norm_act"
        third = self.reflect if self.output_padding is None else self.output_padding
        return op, (self.stride, self.padding, third, self.groups, self.dilation)

    def channels(self, weight: Sequence[int]) -> tuple[int, int]:
        """(input channels, output channels) of a weight of this shape."""
        first, second = weight[0], weight[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    @memoize
    def sizes(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The output's shape, given the shapes of x and the weight."""
        return (x[0], self.channels(weight)[1], self._size(x, weight, 0), self._size(x, weight, 1))

    def _size(self, x: Sequence[int], weight: Sequence[int], axis: int) -> int:
        reach = self.dilation[axis] * (weight[2 + axis] - 1) + 1
        if self.output_padding is None:
            return (x[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        return (x[2 + axis] - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis]

    @memoize
    def without_reflection(self, x: Sequence[int]) -> tuple[Geometry, tuple[int, ...]]:
        """An equal convolution without reflection, and the shape of its input: x with the reflection padding
        applied."""
        if not self.reflect:
            return self, tuple(x)
        height, width = self.padding
        return self._replace(padding=(0, 0), reflect=False), (*x[:2], x[2] + 2 * height, x[3] + 2 * width)

    @memoize
    def adjoint(self, x: Sequence[int], weight: Sequence[int]) -> Geometry:
        """The convolution that maps the output's gradient to the gradient of x, whose shape is given. Needs a geometry
        without reflection."""
        output_padding = None
        if not self.transposed:  # rows and columns of x that no output reads
            reach = [spread * (size - 1) + 1 for spread, size in zip(self.dilation, weight[2:], strict=True)]
            height, width = ((x[2 + i] + 2 * self.padding[i] - reach[i]) % self.stride[i] for i in range(2))
            output_padding = (height, width)
        return self._replace(output_padding=output_padding)

    @memoize
    def is_adjoint_larger(self, x: Sequence[int], weight: Sequence[int]) -> bool:
        """Whether the adjoint's output is larger than x, so that only its first rows and columns are the gradient of x:
        true if output_padding is at least the stride."""
        plain, read = self.without_reflection(x)
        return plain.adjoint(read, weight).sizes(self.sizes(x, weight), weight)[2:] != read[2:]
