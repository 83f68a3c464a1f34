"""Parity on PyTorch's own sample inputs, and the errors for wrong arguments."""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from fastgen.ops import conv_transpose2d_norm_act
from fastgen.ops._activations import ACTIVATIONS
from tests.support.tolerance import FLOAT32

X, WEIGHT = torch.ones(2, 3, 4, 4), torch.ones(3, 5, 4, 4)
SAMPLES = [
    sample
    for info in op_db
    if info.name == "nn.functional.conv_transpose2d"
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True)
]


def test_there_are_samples():
    assert len(SAMPLES) >= 8


@pytest.mark.parametrize("impl", ("reference", "cpp"))
@pytest.mark.parametrize("activation", (None, "leaky_relu", "tanh"))
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_pytorchs_samples(sample, activation, impl):
    """torch.testing's inputs of conv_transpose2d, then the activation: values and gradients."""
    leaves = [t for t in (sample.input, *sample.args, sample.kwargs.get("bias")) if isinstance(t, torch.Tensor)]
    expected = torch.nn.functional.conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
    if activation is not None:
        expected = torch.nn.functional.leaky_relu(expected) if activation == "leaky_relu" else expected.tanh()
    options = {} if activation is None else {"activation": activation}
    found = conv_transpose2d_norm_act(sample.input, *sample.args, **sample.kwargs, **options, impl=impl)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, expected))
    for actual, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize(
    "arguments, kind, message",
    (
        ({"input": torch.ones(4, 4)}, ValueError, r"input must have 4 dimensions .* got shape \(4, 4\)"),
        ({"input": torch.ones(3, 4, 4)}, ValueError, r"input must have 4 dimensions"),
        ({"input": torch.ones(2, 7, 4, 4)}, ValueError, r"input has 7 channels, weight of shape .* needs 3"),
        ({"input": torch.ones(2, 3, 0, 4)}, ValueError, r"only N may be 0, got input of shape \(2, 3, 0, 4\)"),
        ({"input": X.long()}, TypeError, "input must be float32, float64, bfloat16 or float16, got torch.int64"),
        ({"input": X.to(torch.complex64)}, TypeError, "input must be float32.* got torch.complex64"),
        ({"input": X.tolist()}, TypeError, "input must be a Tensor, got list"),
        ({"weight": WEIGHT.double()}, TypeError, "weight is torch.float64, input is torch.float32"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, input on cpu"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have 4 dimensions .* got shape \(5, 4, 4\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\).* got \(4,\)"),
        ({"bias": torch.ones(5).double()}, TypeError, "bias is torch.float64"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be an int or two ints, got \(1, 2, 3\)"),
        ({"stride": []}, ValueError, r"stride must be an int or two ints, got \[\]"),
        ({"stride": 1.5}, ValueError, "stride must be an int or two ints, got 1.5"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": 9}, ValueError, r"padding \[9, 9\] leaves an output of height -11"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"groups": 2}, ValueError, "groups must divide the 3 channels of input and the 3 of weight.* got 2"),
        ({"groups": 0}, ValueError, "groups must divide .* got 0"),
        ({"stride": 2, "output_padding": 2}, ValueError, "output_padding must be smaller than stride or dilation"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must not be negative, got nan"),
        ({"norm": "layer"}, ValueError, "norm must be one of batch, .* or None, got 'layer'"),
        ({"norm": "group"}, ValueError, "num_groups needs norm='group', got num_groups=None"),
        ({"norm": "group", "num_groups": 2}, ValueError, "num_groups must divide the 5 channels, got 2"),
        ({"residual": X}, ValueError, r"residual must have the output's shape \(2, 5, 7, 7\), got \(2, 3, 4, 4\)"),
        ({"residual": torch.ones(2, 5, 7, 7).half()}, TypeError, "residual is torch.float16"),
        ({"activation": "gelu"}, ValueError, "activation must be one of identity, relu, .* got 'gelu'"),
        (
            {"running_mean": torch.zeros(3), "running_var": torch.ones(3)},
            ValueError,
            r"running_mean must have shape \(5,\)",
        ),
        ({"running_mean": torch.zeros(5)}, ValueError, "running_mean and running_var must be given together"),
        ({"norm_weight": torch.ones(5, 1)}, ValueError, r"norm_weight must have shape \(5,\).* got \(5, 1\)"),
        ({"norm_bias": torch.ones(5).int()}, TypeError, "norm_bias must be float32"),
        ({"training": False}, ValueError, "running_mean and running_var must be given when training=False"),
        ({"input": torch.ones(1, 3, 1, 1), "weight": torch.ones(3, 5, 1, 1)}, ValueError,
         "more than 1 value per channel"),
        ({"input": torch.ones(1, 3, 1, 1), "weight": torch.ones(3, 5, 1, 1), "norm": "instance"}, ValueError,
         "more than 1 spatial element"),
    ),
)  # fmt: skip
@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_bad_arguments(arguments, kind, message, impl):
    arguments = {"input": X, "weight": WEIGHT, "norm": "batch", "training": True, "impl": impl} | arguments
    with pytest.raises(kind, match=message):
        conv_transpose2d_norm_act(**arguments)


@pytest.mark.parametrize("impl", ("reference", "cpp"))
def test_a_sequence_of_one_number_is_for_height_and_width(impl):
    options = {"stride": [2], "padding": (1,), "output_padding": [1], "dilation": torch.Size([2])}
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(3, 5, 4, 4)
    found = conv_transpose2d_norm_act(x, weight, norm=None, activation=None, **options, impl=impl)
    torch.testing.assert_close(found, torch.nn.functional.conv_transpose2d(x, weight, **options), **FLOAT32)


def test_non_finite_values_pass_as_in_pytorch():
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]).view(4, 1, 1, 1)
    weight = torch.ones(1, 1, 1, 1)
    for activation in ACTIVATIONS:
        results = [
            conv_transpose2d_norm_act(x, weight, norm=None, activation=activation, impl=impl)
            for impl in ("cpp", "reference")
        ]
        torch.testing.assert_close(*results, equal_nan=True)
