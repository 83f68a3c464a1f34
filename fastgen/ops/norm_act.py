"""y = activation(normalize(x) + residual): the epilogue of the fused convolutions, alone."""

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
            False; updated in place with the batch's mean and unbiased var when it is True ("instance": their averages
            over the samples). "instance" without them always uses the input's statistics.
        weight, bias: (C,), input's dtype or float32; None stands for 1 and 0. Also norm_weight and norm_bias, as the
            fused convolutions call them.
        momentum: weight of the new statistics in the running ones.
        norm: "batch" (mean and biased var over N and *), "instance" (over *, per sample), "group" (over * and the
            channels of a group, per sample), "none" or None.
        num_groups: groups of channels, for "group" alone.
        residual: input's shape and dtype, or None.
        activation: "relu", "leaky_relu" (negative_slope below 0), "tanh", "sigmoid", "silu", "identity" or None.
        inplace: as in torch.nn's activations: y must not be changed before the backward pass, which may then use y and
            keep nothing else. Without a norm "leaky_relu" does; "relu" always does, as PyTorch's. No input is written
            to.
        process_group: for "batch" in training: the statistics are those of all its ranks' inputs, which may differ in
            N, as in nn.SyncBatchNorm. Every rank must make the call, and its backward pass. First derivatives alone.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y, of input's shape and dtype. Sums run in float32 (float64 for float64).

    Gradients to input, weight, bias and residual, of any order (reverse mode); none to the running statistics.

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation
    asked for cannot run.

    Ioffe and Szegedy, Batch Normalization, 2015; Ulyanov et al., Instance Normalization, 2016; Wu and He, Group
    Normalization, 2018.
    """
    _check.floating("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    for name, first, second in (("weight", weight, norm_weight), ("bias", bias, norm_bias)):
        if first is not None and second is not None:
            raise ValueError(f"{name} and norm_{name} are one argument: give one of them")
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
