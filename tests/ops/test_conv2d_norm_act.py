"""Against PyTorch's own samples, and what the op says of arguments that do not fit."""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from fastgen.ops import conv2d_norm_act

X, WEIGHT = torch.ones(2, 3, 6, 5), torch.ones(4, 3, 3, 3)
SAMPLES = [
    sample
    for info in op_db
    if info.name == "nn.functional.conv2d"
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True)
    if not isinstance(sample.kwargs.get("padding"), str)  # "same" and "valid" are for the caller to work out
]


def test_there_are_samples():
    assert len(SAMPLES) >= 8


@pytest.mark.parametrize("impl", ("reference", "cpp"))
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_pytorchs_samples(sample, impl):
    """torch.testing's inputs of conv2d, then LeakyReLU: values and gradients."""
    options = dict(sample.kwargs)
    weight, bias = (*sample.args, options.pop("bias", None))[:2]
    leaves = [t for t in (sample.input, weight, bias) if t is not None]
    expected = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(sample.input, weight, bias, **options))
    found = conv2d_norm_act(sample.input, weight, bias, norm=None, impl=impl, **options)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, expected))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ({"x": torch.ones(2, 4, 6, 5)}, r"x has 4 channels, weight of shape \(4, 3, 3, 3\) needs 3"),
        ({"padding_mode": "circular"}, "padding_mode must be 'zeros' or 'reflect', got 'circular'"),
        ({"padding_mode": "reflect", "padding": 5}, r"padding must be smaller than x when it reflects, got \[5, 5\]"),
        ({"weight": torch.ones(4, 3, 7, 3)}, r"padding \[0, 0\] leaves an output of height 0 and width 3"),
        ({"weight": torch.ones(3, 1, 3, 3), "groups": 2}, "groups must divide the 3 channels of x and the 3 of weight"),
        ({"bias": torch.ones(3)}, r"bias must have shape \(4,\)"),
        ({"norm": "group", "num_groups": 3}, "num_groups must divide the 4 channels, got 3"),
        ({"residual": torch.ones(2, 4, 6, 5)}, r"residual must have the output's shape \(2, 4, 4, 3\)"),
    ),
)
@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_bad_arguments(arguments, message, impl):
    with pytest.raises(ValueError, match=message):
        conv2d_norm_act(**{"x": X, "weight": WEIGHT, "training": True, "impl": impl} | arguments)
