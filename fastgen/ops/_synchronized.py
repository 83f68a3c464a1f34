"""norm_act for a batch distributed over several processes, whose statistics are merged between the passes
(SyncBatchNorm)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgen.ops import _dispatch, _norm_act
from fastgen.ops._epilogue import Epilogue, KernelEpilogue
from fastgen.ops._layout import accumulation_dtype
from fastgen.ops._question import Choice


def norm_act(x: Tensor, epilogue: Epilogue, chosen: Choice) -> Tensor:
    """norm_act by the chosen implementation, with statistics over the x of all ranks of epilogue.process_group."""
    out, mean, var, count = _Synchronized.apply(
        x, epilogue.norm_weight, epilogue.norm_bias, epilogue.residual, epilogue, chosen
    )
    epilogue.update_running(mean, var, count)
    return out


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, epilogue, chosen
    ):
        mean, var, count = merged(x, epilogue.process_group)
        out, *_ = _run(chosen, "norm_act", x, weight, bias, mean, var, residual, *epilogue.options())
        ctx.epilogue, ctx.chosen = epilogue._replace(residual=None), chosen
        ctx.save_for_backward(x, weight, bias, residual, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, residual, mean, var, count = ctx.saved_tensors
        options = ctx.epilogue.options()
        grad_x, grad_weight, grad_bias, grad_residual = _run(
            ctx.chosen, "norm_act_backward", grads[0], x, weight, bias, mean, var, residual, False, *options
        )
        # grad_x still lacks the gradient through mean and var, which depend on the values of every rank.
        means = torch.cat([grad_weight, grad_bias]).to(mean.dtype)
        dist.all_reduce(means, group=ctx.epilogue.process_group)
        along, level = (means / count).chunk(2)
        rstd = (var + ctx.epilogue.eps).rsqrt()
        gain = rstd if weight is None else rstd * weight
        correction = KernelEpilogue(-gain * rstd * along, -gain * level, mean, torch.ones_like(var), grad_x, "batch")
        grad_x, *_ = _run(ctx.chosen, "norm_act", x, *correction)
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if residual is None else grad_residual,
            None,
            None,
        )


def merged(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """mean and biased var (C,) of all ranks' x (N, C, *), and their number of values per channel (at least one).

    Chan et al., Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    n, z = x.numel() // max(1, x.shape[1]), x.to(accumulation_dtype(x))
    local = torch.cat(
        [*(z.new_zeros(2, x.shape[1]) if n == 0 else _norm_act.moments(z, "batch", 0)), z.new_full((1,), n)]
    )
    all_ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_ranks, local, group)
    means, variances, counts = torch.stack(all_ranks).split([x.shape[1], x.shape[1], 1], 1)
    count = counts.sum().clamp(min=1)
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count


def _run(chosen: Choice, op: str, *inputs):
    """Calls a registered op by the chosen implementation; for "reference", its formula."""
    if chosen.implementation != "reference":
        return _dispatch.call(op, chosen, *inputs)
    return (_norm_act.forward if op == "norm_act" else _norm_act.backward)(*inputs)
