"""The geometry of a convolution: its sizes, its opposite, and which implementation computes it for which tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from fastgen.ops import _choices, _processor, _rules
from fastgen.ops._layout import Like
from fastgen.ops._memory import remembered

Pair = tuple[int, int]  # height, width
Rule: TypeAlias = Callable[..., bool]  # of _rules


class Geometry(NamedTuple):
    """output_padding is None unless transposed."""

    stride: Pair
    padding: Pair
    output_padding: Pair | None
    groups: int
    dilation: Pair
    reflect: bool = False

    @staticmethod
    def of(stride, padding, output_padding, groups, dilation, reflect=False) -> Geometry:
        """From arguments of a schema; an empty output_padding stands for None where an op serves both kinds."""
        return Geometry(
            tuple(stride), tuple(padding), tuple(output_padding) or None, groups, tuple(dilation), reflect
        )  # fmt: skip

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    def arguments(self) -> tuple:
        """Those of the ops that serve both kinds."""
        return self.stride, self.padding, self.output_padding or (), self.groups, self.dilation, self.reflect

    def fused(self) -> tuple[str, tuple]:
        """The op that serves this kind, with its arguments."""
        op = "conv_transpose2d_norm_act" if self.transposed else "conv2d_norm_act"
        third = self.reflect if self.output_padding is None else self.output_padding
        return op, (self.stride, self.padding, third, self.groups, self.dilation)

    def channels(self, weight: Sequence[int]) -> tuple[int, int]:
        """(input channels, output channels) that a weight of this shape stands for."""
        first, second = weight[0], weight[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    @remembered
    def sizes(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The output's shape, from those of x and the weight."""
        return (x[0], self.channels(weight)[1], self._size(x, weight, 0), self._size(x, weight, 1))

    def _size(self, x: Sequence[int], weight: Sequence[int], axis: int) -> int:
        reach = self.dilation[axis] * (weight[2 + axis] - 1) + 1
        if self.output_padding is None:
            return (x[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        return (x[2 + axis] - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis]

    @remembered
    def inner(self, x: Sequence[int]) -> tuple[Geometry, tuple[int, ...]]:
        """The same without reflection, and the shape of what it reads of x: of x mirrored at its borders."""
        if not self.reflect:
            return self, tuple(x)
        height, width = self.padding
        return self._replace(padding=(0, 0), reflect=False), (*x[:2], x[2] + 2 * height, x[3] + 2 * width)

    @remembered
    def opposite(self, x: Sequence[int], weight: Sequence[int]) -> Geometry:
        """The convolution of the output's gradient that gives the gradient of x, of this shape; without reflection."""
        output_padding = None
        if not self.transposed:  # rows and columns of x that no output reads
            reach = [spread * (size - 1) + 1 for spread, size in zip(self.dilation, weight[2:], strict=True)]
            height, width = ((x[2 + i] + 2 * self.padding[i] - reach[i]) % self.stride[i] for i in range(2))
            output_padding = (height, width)
        return self._replace(output_padding=output_padding)

    @remembered
    def wins(self, x: Sequence[int], weight: Like, batch_stats: bool = False) -> str | None:
        """Which of fastgen's implementations is faster than PyTorch's convolution for x's shape, None if none is.

        As measured on this chip (`_choices`), else by `_rules`, where "own" is the one that auto takes.
        """
        return self._best("forward", x, weight, batch_stats, _rules.forward, self, x)

    @remembered
    def wins_weight_grad(self, x: Sequence[int], weight: Like, channels_last: bool) -> str | None:
        """The same of the weight's gradient, where the images with more channels are `channels_last`."""
        return self._best("weight_grad", x, weight, channels_last, _rules.weight_grad, self, x)

    @remembered
    def wins_input_grad(self, x: Sequence[int], weight: Like) -> str | None:
        """The same of x's gradient, which is the opposite convolution; by rule where that one's does."""
        inner, read = self.inner(x)
        opposite, sizes = inner.opposite(read, weight.shape), self.sizes(x, weight.shape)
        return self._best("input_grad", x, weight, False, _rules.forward, opposite, sizes)

    def _best(
        self,
        what: str,
        x: Sequence[int],
        weight: Like,
        flag: bool,
        rule: Rule,
        computed: Geometry,
        reads: Sequence[int],
    ) -> str | None:
        """The answer to a question of `_choices`, where `computed` on images of the shape `reads` is what is to be
        computed."""
        processor = _processor.here()
        if _rules.torch_is_wrong(processor, computed, reads, weight):
            return "own"
        return _choices.best(what, self, x, weight, flag, rule(processor, computed, reads, weight, flag))

    @remembered
    def is_opposite_larger(self, x: Sequence[int], weight: Sequence[int]) -> bool:
        """Whether the opposite convolution gives more than x's gradient, which it starts with: where output_padding is
        a stride or more."""
        inner, read = self.inner(x)
        return inner.opposite(read, weight).sizes(self.sizes(x, weight), weight)[2:] != read[2:]
