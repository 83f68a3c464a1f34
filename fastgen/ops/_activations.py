"""The activations: one row each. csrc/shared/activation.h and fastgen/runtime/_steps.py have the same names in the same
order, kernels/_activations.py a branch for each (tests/test_activations.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation y = f(z); slope is what LeakyReLU multiplies negative values by, and the others ignore it."""

    module: type[nn.Module]
    function: Callable[[Tensor, float], Tensor]  # (z, slope) -> y
    gradient: Callable[[Tensor, Tensor, float], Tensor]  # (gradient of y, z, slope) -> gradient of z, differentiable
    in_place: Callable[[Tensor, float], Tensor] | None = None  # the function, overwriting z; if autograd allows that


def _sigmoid_gradient(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    y = torch.sigmoid(z)
    return grad * y * (1 - y)


def _silu_gradient(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    y = torch.sigmoid(z)
    return grad * y * (1 + z * (1 - y))


def _leaky_relu_gradient(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, grad, grad * slope)


ACTIVATIONS = {
    "identity": Activation(nn.Identity, lambda z, slope: z, lambda grad, z, slope: grad * 1),
    "relu": Activation(
        nn.ReLU, lambda z, slope: F.relu(z), lambda grad, z, slope: grad * (z > 0), lambda z, slope: F.relu_(z)
    ),
    "leaky_relu": Activation(nn.LeakyReLU, F.leaky_relu, _leaky_relu_gradient),
    "tanh": Activation(
        nn.Tanh,
        lambda z, slope: torch.tanh(z),
        lambda grad, z, slope: grad * (1 - torch.tanh(z) ** 2),
        lambda z, slope: z.tanh_(),
    ),
    "sigmoid": Activation(
        nn.Sigmoid, lambda z, slope: torch.sigmoid(z), _sigmoid_gradient, lambda z, slope: z.sigmoid_()
    ),
    "silu": Activation(nn.SiLU, lambda z, slope: F.silu(z), _silu_gradient),
}
# The registered ops' name for a LeakyReLU with inplace=True, whose caller leaves the output unchanged.
LEAKY_RELU_OF_OUTPUT = "leaky_relu_"
_BY_NAME = ACTIVATIONS | {
    LEAKY_RELU_OF_OUTPUT: ACTIVATIONS["leaky_relu"]._replace(in_place=F.leaky_relu_)  # its slope is not negative
}
# Activations whose gradient follows from the sign of the output: the backward pass needs nothing else.
OF_OUTPUT = ("relu", LEAKY_RELU_OF_OUTPUT)


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    """Applies the activation of this name."""
    return _BY_NAME[activation].function(z, slope)


def activate_in_place(z: Tensor, activation: str, slope: float) -> Tensor:
    """The same for a z that nothing else refers to: overwrites it where autograd allows that."""
    row = _BY_NAME[activation]
    return (row.in_place or row.function)(z, slope)


def activation_grad(grad: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """The gradient of z from that of the activation's output, in differentiable PyTorch."""
    return _BY_NAME[activation].gradient(grad, z, slope)
