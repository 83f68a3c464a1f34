"""The activations and their derivatives, with the same names and order as in csrc/shared/activation.h."""

import triton
import triton.language as tl

ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu")


@triton.jit
def tanh_(x):
    """As csrc/shared/activation.h: a polynomial near 0, where 1 - 2 / (exp(2 x) + 1) cancels (Cephes, tanhf.c)."""
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    magnitude = tl.minimum(tl.abs(x), 20.0)
    large = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    result = tl.where(magnitude < 0.625, small, tl.where(x < 0, -large, large))
    return tl.where(x != x, x, result)


@triton.jit
def sigmoid_(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "tanh":
        z = tanh_(z)
    elif ACTIVATION == "sigmoid":
        z = sigmoid_(z)
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def activate_grad(grad, z, slope, ACTIVATION: tl.constexpr):
    """grad * activation'(z)"""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * slope)
    elif ACTIVATION == "tanh":
        y = tanh_(z)
        grad = grad * (1 - y * y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid_(z)
        grad = grad * y * (1 - y)
    elif ACTIVATION == "silu":
        y = sigmoid_(z)
        grad = grad * y * (1 + z * (1 - y))
    return grad
