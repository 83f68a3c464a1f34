"""z = mu + exp(logvar / 2) * noise, the divergence from the prior, and their gradients; the noise is drawn in
registers.

docs/random.md defines the noise of a key. The key stays on the device: each replay of a CUDA graph draws a new key, and
so new noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import launch, power_of_2, program_id
from fastgen.kernels._layout import in_order, is_channels_last
from torch import Tensor

ELEMENTS = 1024  # per program


@triton.jit
def log_(x):
    """log of a positive normal number, as in csrc/shared/philox.h (Cephes, logf.c)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    e = exponent.to(tl.float32)
    p = 7.0376836292e-2
    p = p * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    square = m * m
    return (m + (p * m * square + e * -2.12194440e-4 - 0.5 * square)) + e * 0.693359375


@triton.jit
def box_muller(first, second):
    """Two normals from two words, as in csrc/shared/philox.h: quarter turns of the angle are exact."""
    u = ((first >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    radius = tl.sqrt(-2 * log_(u))
    quarter = (second + 0x20000000) >> 30
    x = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    swap = (quarter & 1) != 0
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    c = tl.where(((quarter + 1) & 2) != 0, -c, c)
    s = tl.where((quarter & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def words(key, counter):
    """The four words of each counter."""
    seed = tl.load(key)
    offset = tl.load(key + 1)
    counter = counter.to(tl.int64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + (offset & 0xFFFFFFFF).to(tl.uint32), zero + (offset >> 32).to(tl.uint32))


@triton.jit
def noise(key, start, column, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr):
    """Normals (ROWS, 4 * COUNTERS) of the elements start (ROWS, 1) + column (1, 4 * COUNTERS).

    ALIGNED: every row starts at a counter's first element, so that each counter is drawn once. Else each counter is
    drawn once per element.
    """
    if ALIGNED:
        first = tl.reshape(tl.min(column, 1), (1, 1))
        counter = (start + first) // 4 + tl.arange(0, COUNTERS)[None, :]
        a, b, c, d = words(key, counter)
        n0, n1 = box_muller(a, b)
        n2, n3 = box_muller(c, d)
        values = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, 4 * COUNTERS))
    else:
        a, b, c, d = words(key, (start + column) // 4)
        position = (start + column) % 4
        even, odd = box_muller(tl.where(position < 2, a, c), tl.where(position < 2, b, d))
        values = tl.where(position % 2 == 0, even, odd)
    return values


@triton.jit
def tile_of(rows, length, WIDE: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr):
    """The program's batch and the number of batches, its rows, their first elements (ROWS, 1), its columns (1, 4 *
    COUNTERS), the mask of existing elements, the index of its chunk of the rows, and the size of all rows."""
    tiles = tl.cdiv(rows, ROWS)
    programs = tiles * tl.cdiv(length, 4 * COUNTERS)  # per batch
    batch = program_id(WIDE) // programs
    program = program_id(WIDE) % programs
    chunk = program // tiles
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    column = chunk * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)[None, :]
    size = tl.cast(rows, tl.int64) * length if WIDE else rows * length
    inside = (row < rows)[:, None] & (column < length)
    return batch, tl.num_programs(0) // programs, row, (row * length)[:, None], column, inside, chunk, size


@triton.jit
def clamp(value, low, high):
    """value within the bounds; NaN stays NaN, and None means no bound."""
    if low is not None:
        value = tl.where(value < low, low, value)
    if high is not None:
        value = tl.where(value > high, high, value)
    return value


@triton.jit
def divergence(mu, logvar, prior_mean, prior_logvar, at, inside):
    """The divergence of each element, and the shift, slope and ratio that its gradients need."""
    shift = mu
    slope = mu
    log_ratio = logvar
    if prior_mean is not None:
        log_prior = tl.load(prior_logvar + at, inside, 0.0).to(tl.float32)
        shift = mu - tl.load(prior_mean + at, inside, 0.0).to(tl.float32)
        slope = shift * tl.exp(-log_prior)
        log_ratio = logvar - log_prior
    ratio = tl.exp(log_ratio)
    return 0.5 * (ratio - 1 - log_ratio + shift * slope), shift, slope, ratio


@triton.jit
def sample(
    mu, logvar, key, prior_mean, prior_logvar, z, kl, low, high, free_bits, rows, length, samples,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """mu (batch, rows, length), z (batch, samples, rows, length); kl (chunks, batch, rows): parts of the divergence of
    each row."""
    batch, batches, row, start, column, inside, chunk, size = tile_of(rows, length, WIDE, ROWS, COUNTERS)
    at = batch * size + start + column
    mean = tl.load(mu + at, inside, 0.0).to(tl.float32)
    log = clamp(tl.load(logvar + at, inside, 0.0).to(tl.float32), low, high)
    scale = tl.exp(0.5 * log)
    to = z + batch * samples * size + start + column
    for _ in range(0, samples):
        value = mean + scale * noise(key + 2 * batch, start, column, ALIGNED, ROWS, COUNTERS)
        tl.store(to, value.to(z.dtype.element_ty), inside)
        start += size
        to += size
    if kl is not None:
        term, _, _, _ = divergence(mean, log, prior_mean, prior_logvar, at, inside)
        term = tl.where(inside, tl.where(term < free_bits, free_bits, term), 0.0)
        tl.store(kl + (chunk * batches + batch) * rows + row, tl.sum(term, 1), row < rows)


@triton.jit
def sample_backward(
    grad_z, grad_kl, mu, logvar, key, prior_mean, prior_logvar, grad_mu, grad_logvar, grad_prior_mean,
    grad_prior_logvar, low, high, free_bits, beta, rows, length, samples, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    batch, _, row, start, column, inside, _, size = tile_of(rows, length, WIDE, ROWS, COUNTERS)
    at = batch * size + start + column
    mean = tl.load(mu + at, inside, 0.0).to(tl.float32)
    unbounded = tl.load(logvar + at, inside, 0.0).to(tl.float32)
    log = clamp(unbounded, low, high)
    mu_grad = tl.zeros((ROWS, 4 * COUNTERS), tl.float32)
    noise_sum = tl.zeros((ROWS, 4 * COUNTERS), tl.float32)
    if grad_z is not None:
        source = grad_z + batch * samples * size + start + column
        for _ in range(0, samples):
            grad = tl.load(source, inside, 0.0).to(tl.float32)
            mu_grad += grad
            noise_sum += grad * noise(key + 2 * batch, start, column, ALIGNED, ROWS, COUNTERS)
            start += size
            source += size
    logvar_grad = noise_sum * 0.5 * tl.exp(0.5 * log)
    if grad_kl is not None:
        term, shift, slope, ratio = divergence(mean, log, prior_mean, prior_logvar, at, inside)
        grad = beta * tl.load(grad_kl + batch * rows + row, row < rows, 0.0)[:, None]
        grad = tl.where(term < free_bits, 0.0, grad)
        mu_grad += grad * slope
        logvar_grad += 0.5 * grad * (ratio - 1)
        if prior_mean is not None:
            tl.store(grad_prior_mean + at, (-grad * slope).to(mu.dtype.element_ty), inside)
            prior_logvar_grad = 0.5 * grad * (1 - ratio - shift * slope)
            tl.store(grad_prior_logvar + at, prior_logvar_grad.to(mu.dtype.element_ty), inside)
    if low is not None:
        logvar_grad = tl.where(unbounded < low, 0.0, logvar_grad)
    if high is not None:
        logvar_grad = tl.where(unbounded > high, 0.0, logvar_grad)
    tl.store(grad_mu + at, mu_grad.to(mu.dtype.element_ty), inside)
    tl.store(grad_logvar + at, logvar_grad.to(mu.dtype.element_ty), inside)


def _launch(kernel, mu: Tensor, key: Tensor, num_samples: int, by_row: bool, **arguments) -> None:
    """by_row: the kernel sums over each row; else all of mu is one row."""
    batch = key.numel() // 2
    rows = mu.shape[key.dim() - 1] if by_row or num_samples > 1 else 1
    length = mu.numel() // (batch * rows)
    columns = min(ELEMENTS, max(16, power_of_2(length)))
    tile_rows = min(ELEMENTS // columns, power_of_2(rows))
    chunks = triton.cdiv(length, columns)
    if arguments.get("kl", False) is True:
        arguments["kl"] = mu.new_empty((chunks, batch, rows), dtype=torch.float32)
    launch(
        kernel, (triton.cdiv(rows, tile_rows) * chunks * batch,), mu, mu=mu, key=key.contiguous(), rows=rows,
        length=length, samples=max(1, num_samples), **arguments, ALIGNED=length % 4 == 0 or rows * max(1,
        num_samples) == 1, WIDE=mu.numel() * max(1, num_samples) >= 2**31 - 2**20, ROWS=tile_rows,
        COUNTERS=columns // 4,
    )  # fmt: skip
    return arguments.get("kl")


def forward(
    mu, logvar, key, prior_mean, prior_logvar, num_samples, with_kl, logvar_min, logvar_max, free_bits, beta
) -> tuple[Tensor, Tensor]:
    """The op fastgen::reparameterize."""
    at = key.dim() - 1
    ordered = is_channels_last(mu) and at == 0 and not num_samples
    mu, logvar, prior_mean, prior_logvar = (
        None if t is None else in_order(t, ordered) for t in (mu, logvar, prior_mean, prior_logvar)
    )
    shape = (*mu.shape[:at], num_samples, *mu.shape[at:])
    z = mu.new_empty(shape) if num_samples else torch.empty_like(mu)
    if mu.numel() == 0:
        return z, mu.new_zeros(mu.shape[: at + 1] if with_kl else 0, dtype=torch.float32)
    kl = _launch(
        sample, mu, key, num_samples, with_kl, logvar=logvar, prior_mean=prior_mean, prior_logvar=prior_logvar, z=z,
        kl=True if with_kl else None, low=logvar_min, high=logvar_max, free_bits=free_bits,
    )  # fmt: skip
    if kl is None:
        return z, mu.new_empty(0, dtype=torch.float32)
    kl = kl[0] if len(kl) == 1 else kl.sum(0, dtype=torch.float64).float()
    return z, (kl * beta).view(mu.shape[: at + 1])


def backward(
    grad_z, grad_kl, mu, logvar, key, prior_mean, prior_logvar, num_samples, logvar_min, logvar_max, free_bits, beta
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op fastgen::reparameterize_backward."""
    ordered = is_channels_last(mu) and key.dim() == 1 and not num_samples
    mu, logvar, prior_mean, prior_logvar = (
        None if t is None else in_order(t, ordered) for t in (mu, logvar, prior_mean, prior_logvar)
    )
    grad_z = None if grad_z is None else in_order(grad_z, ordered)
    grads = [
        torch.empty_like(mu) if needed else mu.new_empty(0) for needed in (True, True, *(prior_mean is not None,) * 2)
    ]
    if mu.numel() == 0:
        return tuple(grads)
    if grad_kl is None and prior_mean is not None:
        grads[2:] = [torch.zeros_like(mu) for _ in range(2)]
    _launch(
        sample_backward, mu, key, num_samples, grad_kl is not None, logvar=logvar, prior_mean=prior_mean,
        prior_logvar=prior_logvar, grad_z=grad_z, grad_kl=None if grad_kl is None else grad_kl.contiguous(),
        grad_mu=grads[0], grad_logvar=grads[1], grad_prior_mean=grads[2], grad_prior_logvar=grads[3], low=logvar_min,
        high=logvar_max, free_bits=free_bits, beta=beta,
    )  # fmt: skip
    return tuple(grads)
