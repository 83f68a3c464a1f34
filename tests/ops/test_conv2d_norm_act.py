"""Parity on PyTorch's own sample inputs, and the errors for wrong arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

from fastgen.ops import conv2d_norm_act
from tests.support.tolerance import FLOAT32

X, WEIGHT = torch.ones(2, 3, 6, 5), torch.ones(4, 3, 3, 3)
SAMPLES = [
    sample
    for info in op_db
    if info.name == "nn.functional.conv2d"
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True)
]


def test_there_are_samples():
    assert len(SAMPLES) >= 8


@pytest.mark.parametrize("impl", ("reference", "cpp"))
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_pytorchs_samples(sample, impl):
    """torch.testing's inputs of conv2d, unchanged and with LeakyReLU: values and gradients."""
    plain = F.conv2d(sample.input, *sample.args, **sample.kwargs)
    torch.testing.assert_close(conv2d_norm_act(sample.input, *sample.args, **sample.kwargs, impl=impl), plain)
    leaves = [t for t in (sample.input, *sample.args, sample.kwargs.get("bias")) if isinstance(t, torch.Tensor)]
    expected = F.leaky_relu(plain)
    found = conv2d_norm_act(sample.input, *sample.args, **sample.kwargs, activation="leaky_relu", impl=impl)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, expected))
    for actual, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ({"input": torch.ones(2, 4, 6, 5)}, r"input has 4 channels, weight of shape \(4, 3, 3, 3\) needs 3"),
        ({"padding_mode": "circular"}, "padding_mode must be 'zeros' or 'reflect', got 'circular'"),
        (
            {"padding_mode": "reflect", "padding": 5},
            r"padding must be smaller than the input when it reflects, got \[5, 5\]",
        ),
        ({"weight": torch.ones(4, 3, 7, 3)}, r"padding \[0, 0\] leaves an output of height 0 and width 3"),
        (
            {"weight": torch.ones(3, 1, 3, 3), "groups": 2},
            "groups must divide the 3 channels of input and the 3 of weight",
        ),
        ({"bias": torch.ones(3)}, r"bias must have shape \(4,\)"),
        ({"norm": "group", "num_groups": 3}, "num_groups must divide the 4 channels, got 3"),
        ({"residual": torch.ones(2, 4, 6, 5)}, r"residual must have the output's shape \(2, 4, 4, 3\)"),
    ),
)
@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_bad_arguments(arguments, message, impl):
    with pytest.raises(ValueError, match=message):
        conv2d_norm_act(**{"input": X, "weight": WEIGHT, "norm": "batch", "training": True, "impl": impl} | arguments)


@pytest.mark.parametrize("impl", ("reference", "cpp"))
@pytest.mark.parametrize("mode", ("zeros", "reflect"))
@pytest.mark.parametrize("kernel", ((3, 3), (4, 2), (1, 5)))
def test_padding_same(kernel, mode, impl):
    """As in nn.Conv2d, an even kernel gets one more pixel of padding at the end."""
    x, weight = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    layer = torch.nn.Conv2d(3, 4, kernel, padding="same", padding_mode=mode, dilation=(1, 2), bias=False)
    layer.weight.data = weight
    found = conv2d_norm_act(x, weight, None, 1, "same", (1, 2), padding_mode=mode, impl=impl)
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_a_sequence_of_one_number_is_for_height_and_width(impl):
    options = {"stride": [2], "padding": (1,), "dilation": [2]}
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 3)
    found = conv2d_norm_act(x, weight, **options, impl=impl)
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight, **options), **FLOAT32)


def test_padding_in_words():
    with pytest.raises(ValueError, match=r"padding='same' needs a stride of 1, got \[2, 2\]"):
        conv2d_norm_act(X, WEIGHT, stride=2, padding="same")
    for mode in ("zeros", "reflect"):
        with pytest.raises(ValueError, match=r"input must have 4 dimensions .*, got shape \(9, 9\)"):
            conv2d_norm_act(torch.ones(9, 9), torch.ones(4, 3, 2, 2), padding="same", padding_mode=mode)
    with pytest.raises(ValueError, match="padding must be 'same', 'valid', an int or two ints, got 'full'"):
        conv2d_norm_act(X, WEIGHT, padding="full")
