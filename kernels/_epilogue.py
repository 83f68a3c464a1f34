"""The epilogue of a convolution, or norm_act itself: norm, residual and activation in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels._activations import activate
from fastgen.kernels._launch import launch, new_pair, power_of_2, program_id, wide
from fastgen.kernels._layout import channel_lines, in_order, is_channels_last, line_base, line_step, one_line
from fastgen.kernels._statistics import Parts, merge_moments
from torch import Tensor


class Epilogue(NamedTuple):
    """activation((z + bias - mean) / sqrt(var + eps) * norm_weight + norm_bias + residual); by default, z.

    The fields before bias are the arguments of the ops, in the order of their schemas. With a norm, mean and var None
    mean the statistics of z.
    """

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    residual: Tensor | None = None
    norm: str = "none"
    num_groups: int = 0
    eps: float = 0.0
    activation: str = "identity"
    slope: float = 0.0
    bias: Tensor | None = None  # of a convolution

    @classmethod
    def of(cls, *arguments: Any, bias: Tensor | None = None) -> Epilogue:
        """From the arguments of an op, in the order of its schema."""
        epilogue = cls(*arguments, bias=bias)
        vectors = {name: None if (t := getattr(epilogue, name)) is None else t.contiguous() for name in _VECTORS}
        activation = "leaky_relu" if epilogue.activation == "leaky_relu_" else epilogue.activation
        return epilogue._replace(activation=activation, **vectors)

    @property
    def batch_stats(self) -> bool:
        return self.norm != "none" and self.mean is None

    def residual_like(self, x: Tensor) -> Epilogue:
        """This epilogue with the residual in the memory order of x."""
        return self if self.residual is None else self._replace(residual=in_order(self.residual, is_channels_last(x)))

    def stats_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the statistics of x: (c,), or (n, groups) for groups of channels per sample."""
        n, c = x.shape[:2]
        return (c,) if self.norm == "batch" else (n, self.num_groups if self.norm == "group" else c)

    def empty_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean and var of an empty x: NaN, as in PyTorch; empty tensors if they are arguments."""
        if not self.batch_stats:
            return new_pair(x, 0)
        nan = x.new_full(self.stats_shape(x), float("nan"), dtype=torch.float32)
        return nan, nan.clone()

    def arguments(self) -> dict[str, Any]:
        """The arguments of every kernel with an epilogue."""
        return {name: getattr(self, name) for name in _ARGUMENTS} | {"ACTIVATION": self.activation}


_VECTORS = ("norm_weight", "norm_bias", "mean", "var", "bias")
_ARGUMENTS = ("norm_weight", "norm_bias", "mean", "var", "eps", "slope")


@triton.jit
def tile_of(
    lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The program's tile: its lines, which of them exist, the positions of its values, which of those exist, and
    whether it is the first of its lines."""
    program = program_id(WIDE)
    tiles = tl.cdiv(length, VALUES)
    line = program // tiles * LINES + tl.arange(0, LINES)
    k = program % tiles * VALUES + tl.arange(0, VALUES)[None, :]
    step = line_step(k, inner, outer_step, inner_step, WHOLE)
    at = line_base(line, per_sample, outer_line, inner_line)[:, None] + step
    return line, line < lines, at, (line < lines)[:, None] & (k < length), program % tiles == 0


@triton.jit
def per_channel(pointer, channel, valid, default: tl.constexpr):
    """A vector's values per channel, or the default if there is no vector."""
    if pointer is None:
        values = tl.full(channel.shape, default, tl.float32)
    else:
        values = tl.load(pointer + channel, valid, 0.0).to(tl.float32)
    return values


@triton.jit
def apply(
    x, summands, summand_step, bias, out, residual, norm_weight, norm_bias, mean, var, means, m2s, counts, new_mean,
    new_var, eps, slope, channels, group, lines, per_sample, outer_line, inner_line, length, inner, outer_step,
    inner_step, stat_lines, splits, SUM: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The epilogue of x. Partial statistics (means, m2s, counts), if any, are merged and stored in new_mean and
    new_var.

    SUM: z is the sum of `summands` tensors, `summand_step` apart, plus a bias per channel.
    """
    line, valid, at, inside, is_first = tile_of(
        lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE, WIDE, LINES, VALUES
    )
    source = x + at
    z = tl.load(source, inside, 0.0).to(tl.float32)
    channel = line % channels
    if SUM:
        for _ in range(1, summands):
            source += summand_step
            z += tl.load(source, inside, 0.0)
        z += per_channel(bias, channel, valid, 0.0)[:, None]
    if NORM:
        if means is not None:
            stats = line // group  # index of the line's statistics, which `group` channels share
            center, variance = merge_moments(means, m2s, counts, stats, valid, stat_lines, splits, SPLITS)
            first = valid & is_first & (line % group == 0)
            tl.store(new_mean + stats, center, first)
            tl.store(new_var + stats, variance, first)
        else:
            center = per_channel(mean, channel, valid, 0.0)
            variance = per_channel(var, channel, valid, 1.0)
        rstd = 1 / tl.sqrt(variance + eps)
        gain = per_channel(norm_weight, channel, valid, 1.0)
        shift = per_channel(norm_bias, channel, valid, 0.0)
        z = (z - center[:, None]) * rstd[:, None] * gain[:, None] + shift[:, None]
    if residual is not None:
        z += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, activate(z, slope, ACTIVATION).to(out.dtype.element_ty), inside)


def normalize(
    x: Tensor, epilogue: Epilogue, parts: Parts | None = None, summands: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The epilogue of x, and mean and var. parts: the partial statistics of x, unless mean and var are known.

    summands: tensors (splits, *) in the memory order of x whose sum, plus the bias, replaces x.
    """
    out = torch.empty_like(x)
    norm, c = epilogue.norm, x.shape[1]
    per_sample = parts is not None and norm != "batch"
    plain = norm == "none" and summands is None
    lines = one_line(x) if plain else channel_lines(x, is_channels_last(x), per_sample)
    new_mean, new_var = new_pair(x, *((0,) if parts is None else epilogue.stats_shape(x)))
    means, m2s, counts = (None, None, None) if parts is None else parts.fewer()
    splits = 1 if means is None else len(means)
    tile = lines.tile()
    launch(
        apply, (triton.cdiv(lines.lines, tile[0]) * triton.cdiv(lines.length, tile[1]),), x,
        x=x if summands is None else summands, summands=1 if summands is None else len(summands),
        summand_step=x.numel(), bias=None if summands is None else epilogue.bias, out=out, residual=epilogue.residual,
        means=means, m2s=m2s, counts=counts, new_mean=new_mean, new_var=new_var, channels=c,
        group=c // epilogue.num_groups if norm == "group" else 1, **epilogue.arguments(), **lines.arguments(),
        stat_lines=1 if means is None else means.shape[1], splits=splits, SUM=summands is not None,
        NORM=norm != "none", WIDE=wide(x), LINES=tile[0], VALUES=tile[1], SPLITS=power_of_2(splits),
    )  # fmt: skip
    return out, new_mean, new_var
