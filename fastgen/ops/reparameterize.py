"""z = mu + exp(logvar / 2) * noise with the noise drawn inside the kernel, optionally with each sample's KL divergence
in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _autograd, _check, _dispatch, _tiers
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

# key: (*batch, 2), seed and offset; mu: (*batch, N, *); z: (*batch, num_samples, N, *), without num_samples where that
# is 0. docs/random.md says which noise a key stands for.
torch.library.define("fastgen::philox_normal", "(Tensor key, SymInt[] size, ScalarType dtype) -> Tensor")
OPTIONS = "float? logvar_min, float? logvar_max, float free_bits, float beta"
torch.library.define(
    "fastgen::reparameterize",
    "(Tensor mu, Tensor logvar, Tensor key, Tensor? prior_mean, Tensor? prior_logvar, int num_samples, bool with_kl, "
    f"{OPTIONS}) -> (Tensor z, Tensor kl)",
)
torch.library.define(
    "fastgen::reparameterize_backward",
    "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor key, Tensor? prior_mean, Tensor? prior_logvar, "
    f"int num_samples, {OPTIONS}) -> (Tensor mu, Tensor logvar, Tensor prior_mean, Tensor prior_logvar)",
)
_tiers.register("reparameterize", "reference", "cpp", "cuda", "triton")


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    logvar_range: tuple[float | None, float | None] | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """z = mu + exp(logvar / 2) * noise, the noise standard normal.

    Args:
        mu: (N, *), float32, float64, bfloat16 or float16; any strides. A 4-d channels_last mu gives a channels_last z.
        logvar: natural logarithm of the variance; mu's shape and dtype.
        num_samples: number of draws per input, as for importance weighting; None: one draw and no extra dimension.
        logvar_range: (minimum, maximum) to which logvar is clamped; None for either: no bound. The gradient is zero
            outside.
        generator: on mu's device; None: PyTorch's default generator.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        z of mu's shape, or (num_samples, N, *), in mu's dtype. Noise and arithmetic are float32 (float64 for float64).

    Each call draws one key from the generator, and the noise is a function of the key (docs/random.md):
    torch.manual_seed, checkpointing and torch.func.vmap(randomness=) work as with torch.randn. The backward pass needs
    only the key (16 bytes), not the noise.

    Gradients of any order (reverse mode) flow to mu and logvar.

    Raises ValueError or TypeError that names an invalid argument; RuntimeError if the requested implementation cannot
    run.

    Kingma and Welling, Auto-Encoding Variational Bayes, 2014; Burda et al., Importance Weighted Autoencoders, 2016.
    """
    return _sample(mu, logvar, None, None, _Options(num_samples, False, logvar_range), generator, impl)[0]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    free_bits: float = 0.0,
    beta: float = 1.0,
    num_samples: int | None = None,
    logvar_range: tuple[float | None, float | None] | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """reparameterize, and the Kullback-Leibler divergence of N(mu, exp(logvar)) from the prior, in one pass.

    kl[n] = beta * sum over * of max(free_bits, (exp(l) - 1 - l + (mu - prior_mean)^2 / exp(prior_logvar)) / 2), with
    l = logvar - prior_logvar.

    Args:
        prior_mean, prior_logvar: numbers, or tensors that broadcast to mu's shape, such as (*) for a prior that all
            samples share. None stands for 0; with None for both, the prior is the standard normal.
        free_bits: minimum cost per element in nats; 0: no minimum. An element below it gets no gradient from kl.
        beta: weight of the divergence.

    The other arguments, z and the errors are those of reparameterize. The divergence uses the clamped logvar.

    Returns:
        z, and kl (N,) in float32 (float64 for float64). Partial sums of kl run in that dtype and are added in float64.

    Gradients of any order (reverse mode) flow to mu, logvar and the prior's tensors.

    Kingma and Welling, 2014; Higgins et al., beta-VAE, 2017; free bits: Kingma et al., Improving Variational Inference
    with Inverse Autoregressive Flow, 2016, here for each element of each sample.
    """
    options = _Options(num_samples, True, logvar_range, free_bits, beta)
    return _sample(mu, logvar, prior_mean, prior_logvar, options, generator, impl)


class _Options(NamedTuple):
    num_samples: int | None
    with_kl: bool
    logvar_range: tuple[float | None, float | None] | None
    free_bits: float = 0.0
    beta: float = 1.0

    def checked(self) -> tuple[Any, ...]:
        """num_samples, with_kl and OPTIONS of the schema."""
        count = self.num_samples
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"num_samples must be a positive int or None, got {count!r}")
        bounds = self.logvar_range if self.logvar_range is not None else (None, None)
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ValueError(f"logvar_range must be (least, greatest), got {self.logvar_range!r}")
        low, high = (None if bound is None else float(bound) for bound in bounds)
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"logvar_range must be (least, greatest), got {self.logvar_range!r}")
        if not self.free_bits >= 0:
            raise ValueError(f"free_bits must not be negative, got {self.free_bits}")
        return count or 0, self.with_kl, low, high, float(self.free_bits), float(self.beta)


def _sample(
    mu: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | float | None,
    prior_logvar: Tensor | float | None,
    options: _Options,
    generator: torch.Generator | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check.floating("mu", mu)
    _check.floating("logvar", logvar)
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar is {logvar.dtype}, mu is {mu.dtype}: convert one of them")
    if logvar.device != mu.device:
        raise ValueError(f"logvar is on {logvar.device}, mu on {mu.device}: move one of them")
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must have mu's shape {tuple(mu.shape)} (expand it), got {tuple(logvar.shape)}")
    if mu.dim() < 1:
        raise ValueError("mu must have at least 1 dimension (N, *), got a scalar")
    has_prior = prior_mean is not None or prior_logvar is not None
    prior = [_prior(name, value, mu) if has_prior else None
             for name, value in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar))]  # fmt: skip
    checked = options.checked()
    if _dispatch.exports_onnx():  # ONNX has operators for random numbers, but none for noise from a key
        sizes = (checked[0], *mu.shape) if checked[0] else mu.shape
        eps = torch.randn(sizes, dtype=accumulation_dtype(mu), device=mu.device)
        return _formula(mu, logvar, prior[0], prior[1], eps, 0, *checked)
    key = torch.randint(2**63 - 1, (2,), generator=generator, dtype=torch.int64, device=mu.device)
    chosen = _dispatch.choose("reparameterize", impl, mu)
    if chosen.implementation == "reference":
        eps = _noise_like(reference_normal, mu, key, checked[0])
        return _formula(mu, logvar, prior[0], prior[1], eps, 0, *checked)
    return _dispatch.call("reparameterize", chosen, mu, logvar, key, *prior, *checked)


def _prior(name: str, value: Tensor | float | None, mu: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return mu.new_full((), 0.0 if value is None else float(value)).expand(mu.shape)
    _check.floating(name, value)
    if value.device != mu.device:
        raise ValueError(f"{name} is on {value.device}, mu on {mu.device}: move one of them")
    try:
        return value.to(mu.dtype).expand(mu.shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to mu's shape {tuple(mu.shape)}, got {tuple(value.shape)}") from None


# The noise of a key in plain PyTorch, with int64 for the 32-bit words. docs/random.md has it as a table.


def _philox(key: Tensor, blocks: int) -> Tensor:
    """The words of counters 0 to blocks - 1: (*batch, blocks, 4)."""
    low = 0xFFFFFFFF
    seed, offset = key[..., :1], key[..., 1:]
    block = torch.arange(blocks, dtype=torch.int64, device=key.device).expand(*key.shape[:-1], blocks)
    c = [block & low, block >> 32, (offset & low).expand_as(block), ((offset >> 32) & low).expand_as(block)]
    for i in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2^64
        key0, key1 = (seed + i * 0x9E3779B9) & low, ((seed >> 32) + i * 0xBB67AE85) & low
        c = [((b >> 32) & low) ^ c[1] ^ key0, b & low, ((a >> 32) & low) ^ c[3] ^ key1, a & low]
    return torch.stack(c, -1)


def reference_normal(key: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normals (*batch, *size) of the keys (*batch, 2), in float64 and then rounded to `dtype`."""
    count = math.prod(size)
    if dtype == torch.float64:
        words = _philox(key, -(-count // 2))
        bits = ((words[..., 1::2] << 32 | words[..., 0::2]) >> 11) & ((1 << 53) - 1)
        u, turns = (bits[..., 0] + 1).double() * 2.0**-53, bits[..., 1].double() * 2.0**-53
    else:
        words = _philox(key, -(-count // 4))
        u = (((words[..., 0::2] >> 1).float() + 0.5) * 2.0**-31).double()
        turns = words[..., 1::2].double() * 2.0**-32
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * turns
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(key.dim() - 1)
    return normals[..., :count].reshape(*key.shape[:-1], *size).to(dtype)


def _noise_like(normal: Any, mu: Tensor, key: Tensor, num_samples: int) -> Tensor:
    """The noise of z. Elements are numbered in mu's memory order if that is channels_last, else in the order of its
    dimensions."""
    size, dtype = mu.shape[key.dim() - 1 :], accumulation_dtype(mu)
    if num_samples:
        return normal(key, (num_samples, *size), dtype)
    if key.dim() == 1 and is_channels_last(mu):
        n, c, h, w = size
        return normal(key, (n, h, w, c), dtype).permute(0, 3, 1, 2)
    return normal(key, size, dtype)


# The registered ops in plain PyTorch: default kernels, fake kernels, batching rules, gradients. `at` is the dimension
# of N.


def _clamped(logvar: Tensor, low: float | None, high: float | None) -> Tensor:
    logvar = logvar.to(accumulation_dtype(logvar))
    return logvar if low is None and high is None else logvar.clamp(low, high)


def _terms(mu, logvar, prior_mean, prior_logvar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """divergence = (ratio - 1 - log_ratio + shift * slope) / 2, and shift, slope, ratio."""
    shift, slope, log_ratio = mu, mu, logvar
    if prior_mean is not None:
        prior_logvar = prior_logvar.to(mu.dtype)
        shift = mu - prior_mean.to(mu.dtype)
        slope, log_ratio = shift * (-prior_logvar).exp(), logvar - prior_logvar
    ratio = log_ratio.exp()
    return 0.5 * (ratio - 1 - log_ratio + shift * slope), shift, slope, ratio


def _formula(mu, logvar, prior_mean, prior_logvar, eps, at, num_samples, with_kl, low, high, free_bits, beta):
    mean, log = mu.to(eps.dtype), _clamped(logvar, low, high)
    sd = (0.5 * log).exp()
    z = mean.unsqueeze(at) + sd.unsqueeze(at) * eps if num_samples else mean + sd * eps
    z = z.to(mu.dtype)
    if not with_kl:
        return z, mean.new_empty(0)
    divergence = _terms(mean, log, prior_mean, prior_logvar)[0]
    divergence = divergence.clamp(min=free_bits) if free_bits > 0 else divergence
    return z, beta * divergence.reshape(*mu.shape[: at + 1], -1 if mu.numel() else 0).sum(-1)


@_dispatch.kernel("philox_normal", dtype=2)
def _philox_normal(key, size, dtype):
    return reference_normal(key, size, dtype)


@torch.library.register_fake("fastgen::philox_normal")
def _philox_normal_fake(key, size, dtype):
    return key.new_empty((*key.shape[:-1], *size), dtype=dtype)


@_dispatch.kernel("reparameterize", "reparameterize.forward")
def _forward(mu, logvar, key, prior_mean, prior_logvar, num_samples, *options):
    eps = _noise_like(torch.ops.fastgen.philox_normal, mu, key, num_samples)
    z, kl = _formula(mu, logvar, prior_mean, prior_logvar, eps, key.dim() - 1, num_samples, *options)
    return z.contiguous(memory_format=_format(mu, key, num_samples)), kl


def _format(mu, key, num_samples) -> torch.memory_format:
    return memory_format(is_channels_last(mu) and key.dim() == 1 and not num_samples)


@torch.library.register_fake("fastgen::reparameterize")
def _forward_fake(mu, logvar, key, prior_mean, prior_logvar, num_samples, with_kl, *options):
    at = key.dim() - 1
    kl = mu.new_empty(mu.shape[: at + 1] if with_kl else (0,), dtype=accumulation_dtype(mu))
    if num_samples:
        return mu.new_empty((*mu.shape[:at], num_samples, *mu.shape[at:])), kl
    return torch.empty_like(mu.contiguous(memory_format=_format(mu, key, num_samples))), kl


def _backward_formula(
    grad_z, grad_kl, mu, logvar, prior_mean, prior_logvar, eps, at, num_samples, low, high, free_bits, beta
):
    """The gradients of reparameterize in differentiable PyTorch."""
    mean, log = mu.to(accumulation_dtype(mu)), _clamped(logvar, low, high)
    for_mu, for_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    if grad_z is not None:
        for_mu = grad_z.to(mean.dtype)
        along = for_mu * eps
        if num_samples:
            for_mu, along = for_mu.sum(at), along.sum(at)
        for_logvar = 0.5 * along * (0.5 * log).exp()
    for_prior = [mu.new_empty(0)] * 2
    if grad_kl is not None:
        divergence, shift, slope, ratio = _terms(mean, log, prior_mean, prior_logvar)
        grad = beta * grad_kl.to(mean.dtype).reshape(*grad_kl.shape, *(1,) * (mu.dim() - at - 1)).expand_as(mean)
        grad = grad.masked_fill(divergence < free_bits, 0) if free_bits > 0 else grad
        for_mu, for_logvar = for_mu + grad * slope, for_logvar + 0.5 * grad * (ratio - 1)
        if prior_mean is not None:
            for_prior = [(-grad * slope).to(mu.dtype), (0.5 * grad * (1 - ratio - shift * slope)).to(mu.dtype)]
    elif prior_mean is not None:
        for_prior = [torch.zeros_like(mu) for _ in range(2)]
    bounds = ((logvar < low) if low is not None else None, (logvar > high) if high is not None else None)
    for outside in bounds:
        for_logvar = for_logvar if outside is None else for_logvar.masked_fill(outside, 0)
    return for_mu.to(mu.dtype), for_logvar.to(mu.dtype), *for_prior


@_dispatch.kernel("reparameterize_backward", "reparameterize.backward", leading=2)
def _backward(grad_z, grad_kl, mu, logvar, key, prior_mean, prior_logvar, num_samples, *options):
    eps = _noise_like(torch.ops.fastgen.philox_normal, mu, key, num_samples) if grad_z is not None else None
    found = _backward_formula(
        grad_z, grad_kl, mu, logvar, prior_mean, prior_logvar, eps, key.dim() - 1, num_samples, *options
    )
    layout = _format(mu, key, num_samples)
    return tuple(t.clone(memory_format=layout) if t.dim() == mu.dim() and t.numel() else t.clone() for t in found)


@torch.library.register_fake("fastgen::reparameterize_backward")
def _backward_fake(grad_z, grad_kl, mu, logvar, key, prior_mean, prior_logvar, num_samples, *options):
    grads = [torch.empty_like(mu.contiguous(memory_format=_format(mu, key, num_samples))) for _ in range(4)]
    return tuple(grads) if prior_mean is not None else (*grads[:2], mu.new_empty(0), mu.new_empty(0))


def _batched(info, in_dims, tensors) -> list[Tensor | None]:
    """The tensors with the mapped dimension moved to the front, where the ops expect their batch dimension."""
    return [
        None if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


@torch.library.register_vmap("fastgen::philox_normal")
def _philox_normal_vmap(info, in_dims, key, size, dtype):
    return torch.ops.fastgen.philox_normal(*_batched(info, in_dims, (key,)), size, dtype), 0


@torch.library.register_vmap("fastgen::reparameterize")
def _forward_vmap(info, in_dims, *args):
    tensors, options = _batched(info, in_dims, args[:5]), args[5:]
    return torch.ops.fastgen.reparameterize(*tensors, *options), (0, 0 if options[1] else None)


@torch.library.register_vmap("fastgen::reparameterize_backward")
def _backward_vmap(info, in_dims, *args):
    tensors = _batched(info, in_dims, args[:7])
    prior_dim = None if tensors[-1] is None else 0
    return torch.ops.fastgen.reparameterize_backward(*tensors, *args[7:]), (0, 0, prior_dim, prior_dim)


def _setup_forward(ctx, inputs, output):
    *tensors, ctx.num_samples, ctx.with_kl = inputs[:7]
    ctx.options = inputs[7:]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, grad_z, grad_kl):
    if not ctx.with_kl:
        grad_kl = None
    if grad_z is None and grad_kl is None:
        return (None,) * 11
    mu, logvar, key, *prior = ctx.saved_tensors
    grads = _autograd.call(
        "reparameterize_backward", grad_z, grad_kl, mu, logvar, key, *prior, ctx.num_samples, *ctx.options
    )
    prior_grads = (None, None) if prior[0] is None else grads[2:]
    return *grads[:2], None, *prior_grads, *(None,) * 6


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.num_samples = inputs[:8]
    ctx.options = inputs[8:]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *grads):
    grad_z, grad_kl, mu, logvar, key, *prior = ctx.saved_tensors
    eps = _noise_like(torch.ops.fastgen.philox_normal, mu, key, ctx.num_samples) if grad_z is not None else None

    def formula(*inputs):
        return _backward_formula(*inputs, eps, key.dim() - 1, ctx.num_samples, *ctx.options)

    found = _autograd.differentiate(formula, (grad_z, grad_kl, mu, logvar, *prior), grads)
    return *found[:4], None, *found[4:], *(None,) * 5


_autograd.register("fastgen::reparameterize", _forward_backward, _setup_forward)
_autograd.register("fastgen::reparameterize_backward", _double_backward, _setup_backward)
