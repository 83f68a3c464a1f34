"""Parity on PyTorch's own sample inputs, running statistics, and the errors for wrong arguments."""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from fastgen.ops import norm_act
from tests.support.tolerance import units

X = torch.ones(2, 3, 4, 4)
NAMES = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
SAMPLES = [
    sample
    for info in op_db
    if info.name == "nn.functional.batch_norm"
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True)
    if sample.input.dim() >= 2  # batch_norm also accepts an empty 1-d tensor, which has no channels
]


def test_there_are_samples():
    assert len(SAMPLES) >= 8


@pytest.mark.parametrize("impl", ("reference", "cpp"))
@pytest.mark.parametrize("activation", ("leaky_relu", "silu"))
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_pytorchs_samples(sample, activation, impl):
    """torch.testing's inputs of batch_norm, then the activation: values, gradients, running statistics."""
    options = dict(zip(NAMES, sample.args, strict=False)) | sample.kwargs

    def run(call):
        copies = {k: v.clone() if k.startswith("running") and v is not None else v for k, v in options.items()}
        out = call(copies)
        leaves = [
            t for t in (sample.input, *copies.values()) if isinstance(t, torch.Tensor) and t.is_leaf and t.requires_grad
        ]
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0), allow_unused=True)
        return out, *grads, copies.get("running_mean"), copies.get("running_var")

    def composed(o):
        norm = torch.nn.functional.batch_norm(
            sample.input, *(o.get(name) for name in NAMES[:2]), **{name: o[name] for name in NAMES[2:] if name in o}
        )
        return torch.nn.functional.leaky_relu(norm) if activation == "leaky_relu" else torch.nn.functional.silu(norm)

    expected = run(composed)
    for actual, reference in zip(
        run(lambda o: norm_act(sample.input, norm="batch", activation=activation, impl=impl, **o)),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize(
    "arguments, kind, message",
    (
        ({"input": torch.ones(3)}, ValueError, r"input must have at least 2 dimensions \(N, C, \*\), got shape \(3,\)"),
        ({"input": X.int()}, TypeError, "input must be float32, float64, bfloat16 or float16, got torch.int32"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        (
            {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
            ValueError,
            r"running_mean must have shape \(3,\)",
        ),
        ({"norm_weight": torch.ones(3).to("meta")}, ValueError, "norm_weight is on meta, input on cpu"),
        ({"norm_weight": torch.ones(3).half()}, TypeError, "norm_weight is torch.float16, input is torch.float32"),
        (
            {"input": torch.ones(1, 3)},
            ValueError,
            r"Expected more than 1 value per channel when training, got input size \(1, 3\)",
        ),
        ({"norm": "layer"}, ValueError, "norm must be one of"),
        ({"norm": None, "weight": torch.ones(3)}, ValueError, "weight belongs to a norm, and norm is None"),
        ({"norm": "none", "running_mean": torch.ones(3)}, ValueError, "running_mean belongs to a norm"),
        (
            {"weight": X[0, :, 0, 0], "norm_weight": X[0, :, 0, 0]},
            ValueError,
            "weight and norm_weight are the same argument",
        ),
    ),
)
@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_bad_arguments(arguments, kind, message, impl):
    with pytest.raises(kind, match=message):
        norm_act(**{"input": X, "norm": "batch", "training": True, "impl": impl} | arguments)


ROUNDED = units(torch.float32, 1, 0)  # summed in float64, rounded once
VARIANCE = units(torch.float32, 16, 0)  # deviations are rounded, and the squared mean is 10^6 times the variance


@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_near_constant_channels(impl):
    """With a mean a thousand times the standard deviation, the variance agrees with float64 as far as the float32 input
    allows."""
    x = 1000 + torch.randn(16, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, var = torch.zeros(8), torch.zeros(8)
    norm_act(x, mean, var, None, None, True, 1.0, norm="batch", impl=impl)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), **ROUNDED)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), **VARIANCE)


def test_more_than_two_to_the_31_elements():
    """64-bit offsets, in a bfloat16 tensor of 4.3 GB."""
    if _free_memory() < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    x = torch.zeros(1, 1, 2**31 + 16, dtype=torch.bfloat16)
    x[..., -1] = -4
    y = norm_act(x, activation="leaky_relu", negative_slope=0.5, impl="cpp")
    assert y[0, 0, -1] == -2 and y.shape == x.shape


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except OSError:
        return 0


def test_defaults_return_the_input():
    assert norm_act(X) is X
