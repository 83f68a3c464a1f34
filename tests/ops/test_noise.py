"""The sampler's noise: known answers, and a distribution."""

import itertools
import math

import pytest
import torch

from fastgen import ops
from fastgen.ops import _tiers
from fastgen.ops.reparameterize import reference_normal
from tests.cases import SAMPLER, TESTED
from tests.support.tolerance import units

IMPLEMENTATIONS = ("reference", TESTED)
SHORT = [case for case in SAMPLER if case.name != "long-rows"]


def noise(count, seed=0, offset=0, dtype=torch.float32):
    ops.reparameterize(torch.zeros(1), torch.zeros(1), impl=TESTED)  # loads the native op
    return torch.ops.fastgen.philox_normal(torch.tensor([seed, offset]), (count,), dtype)


def test_philox_known_answers():
    """Random123's published vectors for ten rounds: the words for counter and key all zeros, and all ones."""
    from fastgen.ops.reparameterize import _philox

    assert [f"{int(w):08x}" for w in _philox(torch.tensor([0, 0]), 1)[0]] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


# Another library's sine, cosine and logarithm are right to a few units in the last place; near a zero of the sine, to a
# few units of 2 pi.
NOISE = {
    torch.float32: units(torch.float32, 16, 32),
    torch.float64: units(torch.float64, 64, 64),
    torch.bfloat16: units(torch.bfloat16, 2, 2**-11),
}


@pytest.mark.parametrize("dtype", NOISE)
def test_all_implementations_draw_the_same(dtype):
    for key, count in itertools.product(
        ([0, 0], [-1, -1], [2**62 + 12345, 987654321987], [5, -7]), (0, 1, 4, 5, 63, 1027)
    ):
        expected = reference_normal(torch.tensor(key), (count,), dtype)
        torch.testing.assert_close(noise(count, *key, dtype), expected, **NOISE[dtype])


@pytest.mark.skipif(TESTED != "cuda", reason="the CUDA kernels, run on the CPU")
def test_noise_alone_is_drawn_by_the_cuda_kernel(monkeypatch):
    drawn, kernel = [], _tiers.nvcc.kernel
    monkeypatch.setattr(_tiers.nvcc, "kernel", lambda op: drawn.append(op) or kernel(op))
    noise(5), noise(5, dtype=torch.float64)
    assert drawn == ["reparameterize", "philox_normal", "reparameterize"]  # float64 has no kernel


def kolmogorov_smirnov(x):
    """The p-value: the probability that normal draws deviate at least this far (Marsaglia's asymptotic form)."""
    cdf, n = torch.special.ndtr(x.double()).sort().values, x.numel()
    steps = torch.arange(n, dtype=torch.float64) / n
    d = torch.maximum((cdf - steps).amax(), (steps + 1 / n - cdf).amax()).item() * math.sqrt(n)
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * d) ** 2) for k in range(1, 20)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_distribution(dtype):
    """Moments, Kolmogorov-Smirnov and tails of 10^7 draws of a fixed key; a correct sampler fails each bound with
    probability 10^-4."""
    n = 10**7 if dtype == torch.float32 else 2 * 10**6
    x = noise(n, 1234, 5678, dtype).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(x.pow(power).mean() - moment) < 4 * math.sqrt(variance / n), power
    assert kolmogorov_smirnov(x) > 1e-4
    for bound in (3.0, 4.0, 5.0):
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).sum() - expected) < 4 * math.sqrt(expected), bound
    assert x.isfinite().all()


def test_independence():
    """Correlations of neighbours, of their squares, of the halves of a pair and of successive calls are within 4 sigma
    of 0."""
    n = 10**7
    x = noise(n, 42, 1)
    for lag in (1, 2, 3, 4, 64, 4096):
        for f in (torch.Tensor.double, torch.square):
            a, b = f(x[:-lag]).double(), f(x[lag:]).double()
            correlation = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())
            assert abs(correlation) < 4 / math.sqrt(n), lag
    for seed, offset in ((42, 2), (43, 1)):
        y = noise(n, seed, offset)
        assert abs((x.double() * y).mean()) < 4 / math.sqrt(n)
    torch.manual_seed(0)
    a, b = (ops.reparameterize(torch.zeros(10**6), torch.zeros(10**6)) for _ in range(2))
    assert abs((a.double() * b).mean()) < 4e-3
