"""The epilogue (norm, residual, activation): what norm_act computes, and what the fused convolutions compute after the
convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _check
from fastgen.ops._activations import ACTIVATIONS, LEAKY_RELU_OF_OUTPUT, OF_OUTPUT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NORMS = ("batch", "instance", "group", "none")
# KernelEpilogue's fields in the schemas of the registered ops. mean and var: running statistics, or None to compute
# them from the input and return them: (c), or (n, groups) if each sample has its own.
SCHEMA_TENSORS = "Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor? residual"
SCHEMA_OPTIONS = "str norm, int num_groups, float eps, str activation, float negative_slope"
SCHEMA = f"{SCHEMA_TENSORS}, {SCHEMA_OPTIONS}"


class KernelEpilogue(NamedTuple):
    """An epilogue as the registered ops take it; the default computes nothing."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    residual: Tensor | None = None
    norm: str = "none"
    num_groups: int = 0
    eps: float = 0.0
    activation: str = "identity"
    negative_slope: float = 0.0

    @staticmethod
    def of(tensors: Sequence[Tensor | None], options: Options) -> KernelEpilogue:
        return KernelEpilogue(*tensors, *options)  # type: ignore[arg-type,call-arg]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def options(self) -> Options:
        return Options(*self[5:])


class Options(NamedTuple):
    """SCHEMA_OPTIONS."""

    norm: str
    num_groups: int
    eps: float
    activation: str
    negative_slope: float

    def is_identity(self) -> bool:
        """Whether it computes nothing except perhaps adding a residual."""
        return self.norm == "none" and self.activation == "identity"

    def needs_output_alone(self) -> bool:
        """Whether the gradient follows from the sign of the output."""
        return self.norm == "none" and self.activation in OF_OUTPUT


class Epilogue(NamedTuple):
    """An epilogue as the public functions take it, by their names; the default computes nothing."""

    norm: str | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    num_groups: int | None = None
    residual: Tensor | None = None
    activation: str | None = None
    negative_slope: float = 0.01
    inplace: bool = False
    process_group: ProcessGroup | None = None

    def tensors(self, batch_stats: bool) -> tuple[Tensor | None, ...]:
        """SCHEMA_TENSORS."""
        statistics = (None, None) if batch_stats else (self.running_mean, self.running_var)
        return self.norm_weight, self.norm_bias, *statistics, self.residual

    def options(self) -> Options:
        activation = self.activation or "identity"
        if activation == "leaky_relu" and self.inplace and self.negative_slope >= 0:
            activation = LEAKY_RELU_OF_OUTPUT
        norm, groups = self.norm or "none", self.num_groups or 0
        return Options(norm, groups, float(self.eps), activation, float(self.negative_slope))

    def update_running(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Updates the running statistics, if any, with mean and biased var, (C,) or (N, C), of `count` values each."""
        if self.running_mean is None or self.running_var is None or (isinstance(count, int) and count == 0):
            return
        with torch.no_grad():
            unbiased = var * (count / ((count - 1).clamp(min=1) if isinstance(count, Tensor) else max(1, count - 1)))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                new = new.mean(0) if new.dim() == 2 else new
                if running.dtype == new.dtype:
                    running.lerp_(new, self.momentum)
                else:
                    running.copy_(torch.lerp(running.to(new.dtype), new, self.momentum))

    def check(self, x: Tensor, sizes: Sequence[int], affine: tuple[str, str] = ("norm_weight", "norm_bias")) -> bool:
        """Checks the epilogue for an input of these sizes (before the norm) with x's dtype and device. affine: the
        caller's names of the norm's parameters.

        Returns whether the norm's statistics are computed from the input.
        """
        norm = self.norm or "none"
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)} or None, got {self.norm!r}")
        if (self.activation or "identity") not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {self.activation!r}")
        if self.residual is not None:
            _check.same_kind("residual", self.residual, x)
            if tuple(self.residual.shape) != tuple(sizes):
                raise ValueError(
                    f"residual must have the output's shape {tuple(sizes)}, got {tuple(self.residual.shape)}"
                )
        groups = self.num_groups
        if (norm == "group") != (groups is not None):
            raise ValueError(f"num_groups needs norm='group', got num_groups={groups} and norm={norm!r}")
        if groups is not None and (groups < 1 or sizes[1] % groups):
            raise ValueError(f"num_groups must divide the {sizes[1]} channels, got {groups}")
        if self.process_group is not None and norm != "batch":
            raise ValueError(f"process_group needs norm='batch', got norm={norm!r}")
        if norm == "none":
            for name, tensor in zip(("running_mean", "running_var", *affine), self[1:5], strict=True):
                if tensor is not None:
                    raise ValueError(
                        f"{name} belongs to a norm, and norm is {self.norm!r}: pass norm='batch', for example"
                    )
            return False
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        if norm == "group" and self.running_mean is not None:
            raise ValueError("running_mean and running_var have no meaning for norm='group'")
        names = ("running_mean", "running_var", *affine)
        for name, tensor in zip(names, self[1:5], strict=True):
            _check.per_channel(name, tensor, sizes[1], x)
        if (self.running_mean is None) != (self.running_var is None):
            raise ValueError("running_mean and running_var must be given together")
        if norm == "batch" and self.running_mean is None and not self.training:
            raise ValueError("running_mean and running_var must be given when training=False and norm='batch'")
        if not self.training and self.running_mean is not None:
            return False
        pixels = math.prod(sizes[2:])
        if norm == "instance" and pixels == 1:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {tuple(sizes)}")
        channels = sizes[1] // (groups or 1) if norm == "group" else 1
        if norm != "instance" and sizes[0] * channels * pixels == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(sizes)}")
        return True
