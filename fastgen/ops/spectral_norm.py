"""weight / sigma, where sigma is the weight's largest singular value by power iteration: for one weight, or for many in
one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _autograd, _check, _dispatch, _tiers
from fastgen.ops._autograd import differentiate, split
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

torch.library.define(
    "fastgen::spectral_norm",
    "(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int n_power_iterations, float eps, bool v_first, "
    "bool divide) -> (Tensor[] outs, Tensor[] sigmas, Tensor[] us, Tensor[] vs)",
)
torch.library.define(
    "fastgen::spectral_norm_backward",
    "(Tensor[] grad_outs, Tensor[] grad_sigmas, Tensor[] weights, Tensor[] sigmas, Tensor[] us, Tensor[] vs, int[] "
    "dims) "
    "-> Tensor[]",
)
for _name in ("spectral_norm", "spectral_norm_group"):
    _tiers.register(_name, "reference", "cpp", "cuda", "triton")


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    training: bool = True,
    v_first: bool = False,
    divide: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight / sigma with sigma = u^T W v, where W is the matrix (weight.shape[dim], the rest) of the weight.

    Args:
        weight: at least 2-d, float32, float64, bfloat16 or float16; any strides. A channels_last weight stays so.
        u: (weight.shape[dim],), v: (the product of the other sizes,), weight's dtype or float32: estimates of the
            singular vectors of the largest singular value. They are not changed.
        n_power_iterations: steps u = W v / max(|W v|, eps), then v = W^T u / max(|W^T u|, eps), if training.
        training: False: u and v are used as they are.
        v_first: update v, then u, in each step, as in torch.nn.utils.spectral_norm.
        divide: False: return an empty tensor instead of weight / sigma, for callers that divide by sigma later.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        weight / sigma; sigma, a scalar in float32 (float64 for float64); u and v after the steps, new tensors in the
        dtypes of the arguments. Products with the weight run in float32 (float64 for float64), norms in float64.

    Gradients of any order (reverse mode) flow from weight / sigma and sigma to weight; u and v are constants.

    Raises ValueError or TypeError that names an invalid argument; RuntimeError if the requested implementation cannot
    run.

    Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018.
    """
    options = (n_power_iterations, eps, training, v_first, divide)
    outs, sigmas, us, vs = _run("spectral_norm", [weight], [u], [v], [dim], *options, impl)
    return outs[0], sigmas[0], us[0], vs[0]


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    dims: Sequence[int] | int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    training: bool = True,
    v_first: bool = False,
    divide: bool = True,
    impl: str = "auto",
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """spectral_norm of several weights, each with its u, v and dim, in one call.

    Arguments, gradients and errors are those of spectral_norm, with lists of tensors; dims: one per weight, or one for
    all. Returns the four results as lists.
    """
    weights, us, vs = list(weights), list(us), list(vs)
    dims = [dims] * len(weights) if isinstance(dims, int) else list(dims)
    if not len(weights) == len(us) == len(vs) == len(dims):
        raise ValueError(
            "weights, us, vs and dims must have the same length, "
            f"got {len(weights)}, {len(us)}, {len(vs)} and {len(dims)}"
        )
    if not weights:
        return [], [], [], []
    return _run("spectral_norm_group", weights, us, vs, dims, n_power_iterations, eps, training, v_first, divide, impl)


def _run(op, weights, us, vs, dims, n_power_iterations, eps, training, v_first, divide, impl):
    if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be a positive int, got {n_power_iterations!r}")
    dims = [_checked_dim(weight, u, v, dim) for weight, u, v, dim in zip(weights, us, vs, dims, strict=True)]
    options = (dims, n_power_iterations if training else 0, float(eps), v_first, divide)
    if any(weight.device != weights[0].device for weight in weights):
        raise ValueError("weights must be on one device: move them")
    chosen = _dispatch.choose(op, impl, weights[0])
    if chosen.implementation == "reference":
        return _formula(weights, us, vs, *options)
    return tuple(_dispatch.call("spectral_norm", chosen, weights, us, vs, *options))


def _checked_dim(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> int:
    _check.floating("weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"weight must have at least 2 dimensions, got shape {tuple(weight.shape)}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be a dimension of weight, whose shape is {tuple(weight.shape)}, got {dim}")
    for name, vector in (("u", u), ("v", v)):
        _check.floating(name, vector)
        size = weight.shape[dim] if name == "u" else weight.numel() // max(1, weight.shape[dim])
        if tuple(vector.shape) != (size,):
            raise ValueError(f"{name} must have shape ({size},) for a weight {tuple(weight.shape)} and dim {dim}, "
                             f"got {tuple(vector.shape)}")  # fmt: skip
        if vector.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"{name} is {vector.dtype}, weight is {weight.dtype}: convert {name} to that or to float32")
        if vector.device != weight.device:
            raise ValueError(f"{name} is on {vector.device}, weight on {weight.device}: move one of them")
    return dim % weight.dim()


# The registered ops in plain PyTorch: reference and default kernels, fake kernels, gradients.


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.to(accumulation_dtype(weight)).movedim(dim, 0).flatten(1)


def _formula(weights, us, vs, dims, *options):
    results = [_one(*arguments, *options) for arguments in zip(weights, us, vs, dims, strict=True)]
    return tuple(list(of) for of in zip(*results, strict=True))


def _one(weight, u, v, dim, n_power_iterations, eps, v_first, divide):
    matrix = _matrix(weight, dim)
    # Copies, since the caller may overwrite its own u and v.
    new_u, new_v = u.to(matrix.dtype, copy=True), v.to(matrix.dtype, copy=True)
    with torch.no_grad():
        for _ in range(n_power_iterations):
            if v_first:
                new_v = F.normalize(matrix.mT.mv(new_u), dim=0, eps=eps)
            new_u = F.normalize(matrix.mv(new_v), dim=0, eps=eps)
            if not v_first:
                new_v = F.normalize(matrix.mT.mv(new_u), dim=0, eps=eps)
    sigma = torch.dot(new_u, matrix.mv(new_v))
    out = _like((weight / sigma).to(weight.dtype), weight) if divide else weight.new_empty(0)
    return out, sigma, new_u.to(u.dtype), new_v.to(v.dtype)


@_dispatch.kernel("spectral_norm", "spectral_norm.forward")
def _forward(weights, us, vs, *options):
    return _formula(weights, us, vs, *options)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    return value.contiguous(memory_format=memory_format(is_channels_last(weight)))


@torch.library.register_fake("fastgen::spectral_norm")
def _forward_fake(weights, us, vs, dims, n_power_iterations, eps, v_first, divide):
    return (
        [torch.empty_like(_like(weight, weight)) if divide else weight.new_empty(0) for weight in weights],
        [weight.new_empty((), dtype=accumulation_dtype(weight)) for weight in weights],
        *([torch.empty_like(t, memory_format=torch.contiguous_format) for t in of] for of in (us, vs)),
    )


def _backward_formula(grad_outs, grad_sigmas, weights, us, vs, dims):
    """The gradients of weights in differentiable PyTorch, with sigma as a function of the weight."""
    grads = []
    for grad, grad_sigma, weight, u, v, dim in zip(grad_outs, grad_sigmas, weights, us, vs, dims, strict=True):
        matrix, g = _matrix(weight, dim), _matrix(grad, dim)
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        sigma = torch.dot(u, matrix.mv(v))
        slope = grad_sigma.to(matrix.dtype) - (g * matrix).sum() / sigma**2
        sizes = [size for i, size in enumerate(weight.shape) if i != dim]
        grads.append((g / sigma + slope * torch.outer(u, v)).unflatten(1, sizes).movedim(0, dim).to(weight.dtype))
    return grads


@_dispatch.kernel("spectral_norm_backward", "spectral_norm.backward", leading=2)
def _backward(grad_outs, grad_sigmas, weights, sigmas, us, vs, dims):
    grads = _backward_formula(grad_outs, grad_sigmas, weights, us, vs, dims)
    return [_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]


@torch.library.register_fake("fastgen::spectral_norm_backward")
def _backward_fake(grad_outs, grad_sigmas, weights, *rest):
    return [torch.empty_like(_like(weight, weight)) for weight in weights]


def _setup_forward(ctx, inputs, output):
    weights, _, _, ctx.dims, *_, ctx.divide = inputs
    _, sigmas, us, vs = output
    ctx.save_for_backward(*weights, *sigmas, *us, *vs)
    ctx.mark_non_differentiable(*us, *vs)
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, grad_outs, grad_sigmas, grad_us, grad_vs):
    weights, sigmas, us, vs = split(ctx.saved_tensors, 4)
    grad_outs = [
        g if g is not None and ctx.divide else torch.zeros_like(w) for g, w in zip(grad_outs, weights, strict=True)
    ]
    grad_sigmas = [torch.zeros_like(s) if g is None else g for g, s in zip(grad_sigmas, sigmas, strict=True)]
    grads = _autograd.call("spectral_norm_backward", grad_outs, grad_sigmas, weights, sigmas, us, vs, ctx.dims)
    none = [None] * len(weights)
    return grads, none, none


def _setup_backward(ctx, inputs, output):
    grad_outs, grad_sigmas, weights, _, us, vs, ctx.dims = inputs
    ctx.save_for_backward(*grad_outs, *grad_sigmas, *weights, *us, *vs)


def _double_backward(ctx, grads):
    *differentiated, us, vs = split(ctx.saved_tensors, 5)

    def formula(*inputs):
        return _backward_formula(*split(inputs, 3), us, vs, ctx.dims)

    inputs = [t for of in differentiated for t in of]
    none = [None] * len(us)
    return *split(differentiate(formula, inputs, grads), 3), none, none, none


_autograd.register("fastgen::spectral_norm", _forward_backward, _setup_forward)
_autograd.register("fastgen::spectral_norm_backward", _double_backward, _setup_backward)
