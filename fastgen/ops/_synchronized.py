"""norm_act where one batch lies on several processes: their statistics are merged between its passes
(SyncBatchNorm)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgen.ops import _dispatch
from fastgen.ops import norm_act as tails
from fastgen.ops._layout import accumulation_dtype


def norm_act(x: Tensor, tail: tails.Tail, chosen: str) -> Tensor:
    """The op by the implementation that was chosen, with the statistics of all ranks' x of tail.process_group."""
    out, mean, var, count = _Synchronized.apply(x, tail.norm_weight, tail.norm_bias, tail.residual, tail, chosen)
    tail.update_running(mean, var, count)
    return out


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, tail, chosen):
        mean, var, count = merged(x, tail.process_group)
        out, *_ = _run(chosen, "norm_act", x, weight, bias, mean, var, residual, *tail.options())
        ctx.tail, ctx.chosen = tail._replace(residual=None), chosen
        ctx.save_for_backward(x, weight, bias, residual, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, residual, mean, var, count = ctx.saved_tensors
        options = ctx.tail.options()
        grad_x, grad_weight, grad_bias, grad_residual = _run(
            ctx.chosen, "norm_act_backward", grads[0], x, weight, bias, mean, var, residual, False, *options
        )
        # What is missing in grad_x: the way through mean and var, which every rank's values have.
        means = torch.cat([grad_weight, grad_bias]).to(mean.dtype)
        dist.all_reduce(means, group=ctx.tail.process_group)
        along, level = (means / count).chunk(2)
        rstd = (var + ctx.tail.eps).rsqrt()
        gain = rstd if weight is None else rstd * weight
        correction = (-gain * rstd * along, -gain * level, mean, torch.ones_like(var), grad_x)
        grad_x, *_ = _run(ctx.chosen, "norm_act", x, *correction, "batch", 0, 0.0, "identity", 0.0)
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if residual is None else grad_residual,
            None,
            None,
        )


def merged(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """mean and biased var (C,) of all ranks' x (N, C, *), and how many values of a channel they have, one at least.

    Chan et al., Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    n, z = x.numel() // max(1, x.shape[1]), x.to(accumulation_dtype(x))
    own = torch.cat([*(z.new_zeros(2, x.shape[1]) if n == 0 else tails._moments(z, "batch", 0)), z.new_full((1,), n)])
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_ranks, own, group)
    means, variances, counts = torch.stack(all_ranks).split([x.shape[1], x.shape[1], 1], 1)
    count = counts.sum().clamp(min=1)
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count


def _run(chosen: str, op: str, *inputs):
    """A registered op by the implementation chosen; "reference": its formula."""
    if chosen != "reference":
        return _dispatch.call(op, chosen, *inputs)
    return (tails._forward if op == "norm_act" else tails._backward)(*inputs)
