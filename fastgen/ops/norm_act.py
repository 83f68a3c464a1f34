"""y = activation(normalize(x) + residual): the epilogue of the fused convolutions as an op of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgen.ops import _check, _dispatch, _norm_act, _synchronized
from fastgen.ops._epilogue import Epilogue

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def norm_act(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    num_groups: int | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = activation((input - mean) / sqrt(var + eps) * weight + bias + residual).

    With the defaults y is input: no norm, no activation. The first arguments are those of
    torch.nn.functional.batch_norm.

    Args:
        input: (N, C, *), float32, float64, bfloat16 or float16; any strides. A 4-d channels_last input gives a
            channels_last y.
        running_mean, running_var: (C,), input's dtype or float32, for "batch" and "instance". Used when training is
            False; updated in place with the batch's mean and unbiased var when it is True ("instance": with their
            averages over the samples). "instance" without them always uses the input's statistics.
        weight, bias: (C,), input's dtype or float32; None stands for 1 and 0. norm_weight and norm_bias, the names in
            the fused convolutions, are synonyms.
        momentum: weight of the new statistics in the running statistics.
        norm: "batch" (mean and biased var over N and *), "instance" (over *, per sample), "group" (over * and the
            channels of a group, per sample), "none" or None.
        num_groups: number of channel groups, only for "group".
        residual: input's shape and dtype, or None.
        activation: "relu", "leaky_relu" (with slope negative_slope for negative values), "tanh", "sigmoid", "silu",
            "identity" or None.
        inplace: as in torch.nn's activations: y must not be changed before the backward pass, which may then need y
            and no other saved tensor. This is so for "leaky_relu" without a norm; for "relu" it is always so, as in
            PyTorch. No input is overwritten.
        process_group: for "batch" in training: the statistics are taken over the inputs of all its ranks, which may
            differ in N, as in nn.SyncBatchNorm. Every rank must make the call and run its backward pass. Only first
            derivatives exist.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y, of input's shape and dtype. Sums run in float32 (float64 for float64).

    Gradients of any order (reverse mode) flow to input, weight, bias and residual, but not to the running statistics.

    Raises ValueError or TypeError that names an invalid argument; RuntimeError if the requested implementation cannot
    run.

    Ioffe and Szegedy, Batch Normalization, 2015; Ulyanov et al., Instance Normalization, 2016; Wu and He, Group
    Normalization, 2018.
    """
    _check.floating("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    for name, first, second in (("weight", weight, norm_weight), ("bias", bias, norm_bias)):
        if first is not None and second is not None:
            raise ValueError(f"{name} and norm_{name} are the same argument: pass only one of them")
    affine = ("weight" if norm_weight is None else "norm_weight", "bias" if norm_bias is None else "norm_bias")
    weight, bias = norm_weight if weight is None else weight, norm_bias if bias is None else bias
    epilogue = Epilogue(
        norm, running_mean, running_var, weight, bias, training, momentum, eps, num_groups, residual,
        activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    batch_stats = epilogue.check(input, input.shape, affine)
    options = epilogue.options()
    chosen = _dispatch.choose("norm_act", impl, input)
    if batch_stats and process_group is not None:
        return _synchronized.norm_act(input, epilogue, chosen)
    if options.is_identity() and residual is None:
        return input
    if chosen.implementation == "reference":
        return _norm_act.reference(input, epilogue)
    out, mean, var = _dispatch.call("norm_act", chosen, input, *epilogue.tensors(batch_stats), *options)
    if batch_stats:
        epilogue.update_running(mean, var, input.numel() // max(1, mean.numel()))
    return out
