"""Steps of a plan other than convolutions: resizing, pooling, arithmetic, labels, several inputs and outputs."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.errors import FastgenError, UsageError
from fastgen.runtime import Plan
from tests.inference.parity import FEW_LAYERS, NETWORK, prepared, relative_error
from tests.support.networks import SNGANGenerator, VanillaVAE


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


# Layers to put between two convolutions, from 8 channels to 8.
LAYERS = {
    "upsample": nn.Upsample(scale_factor=2),
    "upsample 3x5": nn.Upsample(scale_factor=(3, 5)),
    "upsample to a size": nn.Upsample(size=(13, 30)),
    "upsample to less": nn.Upsample(size=(4, 7)),
    "nearest-exact": nn.Upsample(size=(13, 7), mode="nearest-exact"),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear 3x4": nn.Upsample(scale_factor=(3, 4), mode="bilinear", align_corners=False),
    "bilinear to less": nn.Upsample(size=(5, 3), mode="bilinear"),
    "bilinear, corners": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "bilinear, corners, to a size": nn.Upsample(size=(1, 23), mode="bilinear", align_corners=True),
    "interpolate to half": Call(lambda x: F.interpolate(x, scale_factor=0.5)),
    "average": nn.AvgPool2d(2),
    "average, padded": nn.AvgPool2d(3, 2, 1),
    "average, padding left out": nn.AvgPool2d((3, 2), (1, 2), (1, 1), count_include_pad=False),
    "average, ceil": nn.AvgPool2d(4, 3, 2, ceil_mode=True),
    "average, ceil, padding left out": nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    "largest": nn.MaxPool2d(2),
    "largest, padded": nn.MaxPool2d(3, 2, 1),
    "largest, dilated, ceil": nn.MaxPool2d((3, 2), 2, (1, 1), dilation=(2, 3), ceil_mode=True),
    "adaptive average": nn.AdaptiveAvgPool2d(1),
    "adaptive average, 5x2": nn.AdaptiveAvgPool2d((5, 2)),
    "adaptive largest": nn.AdaptiveMaxPool2d((None, 1)),
    "mean": Call(lambda x: x.mean((2, 3), keepdim=True)),
    "mean of vectors": Call(lambda x: torch.mean(x, (-1, -2))[:, :, None, None]),
    "sum": Call(lambda x: x.sum([2, 3], keepdim=True)),
    "shuffle": nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)),
    "shuffle of 8": nn.Sequential(nn.Conv2d(8, 27, 1), nn.PixelShuffle(3), nn.Conv2d(3, 8, 1)),
    "halves": Call(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "parts": Call(lambda x: torch.cat([x[:, 5:], x[:, :5].tanh(), x.split([2, 6], 1)[0]], 1)[:, 1:9]),
    "product": Call(lambda x: x * torch.sigmoid(x)),
    "gate of channels": Call(lambda x: x.mean((2, 3), keepdim=True).sigmoid() * x),
    "gate of pixels": Call(lambda x: x * x.mean(1, keepdim=True).sigmoid()),
    "sum of channels": Call(lambda x: x + x.sum(1, keepdim=True)),
    "differences": Call(lambda x: (1 - x) * 0.5 - x.mean((2, 3), keepdim=True)),
    "expand": Call(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 4)),
    "expand_as": Call(lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x)], 1)[:, 4:12]),
    "repeat": Call(lambda x: x.mean((2, 3), keepdim=True).repeat(1, 1, 2, 3)),
    "flat": Call(lambda x: torch.cat([x.flatten(1), x.flatten(1) * 2], 1).view(-1, 16, 10, 6)[:, 3:11]),
    "in place": Call(lambda x: (x * 2).tanh_() + (x + 1).sigmoid_()),
    "no padding": Call(lambda x: torch.cat([F.pad(x, (0, 0, 0, 0)), x], 1)[:, 2:10]),
}  # fmt: skip


def around(layer):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(), layer, nn.Conv2d(8, 5, 1), nn.Tanh())


def assert_engine(model, inputs, others, tmp_path, precision="fp32"):
    """The whole model runs in a plan, with several batch sizes and from a file, and satisfies assert_parity."""
    engine = fastgen.Engine(model, inputs, precision=precision, impl="cpp")
    assert [part.runs for part in engine.parts] == ["plan"]
    engine.save(tmp_path / "a.fgplan")
    loaded, plan = fastgen.Engine.load(tmp_path / "a.fgplan"), Plan.load(tmp_path / "a.fgplan")
    exact_model = copy.deepcopy(model).double()
    lower = torch.bfloat16 if precision == "bf16" else torch.float32
    lower_model = copy.deepcopy(model).to(lower)
    for batch in (inputs, *others):
        batch = batch if isinstance(batch, tuple) else (batch,)
        with torch.no_grad():
            exact, expected = (
                as_tuple(each(*(x.to(dtype) if x.is_floating_point() else x for x in batch)))
                for each, dtype in ((exact_model, torch.float64), (lower_model, lower))
            )
        found = as_tuple(engine(*batch))
        assert len(found) == len(exact)
        for each, e, reference in zip(found, exact, expected, strict=True):
            assert each.shape == e.shape and each.dtype == torch.float32
            least = 1e-2 if precision == "bf16" else 1e-5
            assert relative_error(each, e) <= max(2 * relative_error(reference, e), least)
        from_file = (as_tuple(loaded(*batch)), as_tuple(plan(*(x.numpy() for x in batch))))
        for each, a, b in zip(found, *from_file, strict=True):
            assert torch.equal(a, each)
            np.testing.assert_array_equal(b, each.numpy())
    return engine


def as_tuple(outputs):
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_in_the_plan(name, precision, tmp_path):
    model = prepared(lambda: around(LAYERS[name]))
    others = [torch.rand(n, 3, 10, 6) * 2 - 1 for n in (3, 17)]
    assert_engine(model, torch.rand(1, 3, 10, 6) * 2 - 1, others, tmp_path, precision)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.split(",")[0].split(" ")[0] not in ("flat", "parts")])
def test_layers_alone_pass_non_finite_values_on_as_pytorch_does(name):
    model = nn.Sequential(LAYERS[name]).eval()
    x = torch.randn(4, 8, 10, 6)
    engine = fastgen.Engine(model, x, impl="cpp")
    torch.testing.assert_close(engine(x), model(x).detach(), **FEW_LAYERS)
    x[1, 2, 3, 4], x[2, 5, 0, 0], x[2, 6, 7, 1], x[3, 1, 9, 5] = float("nan"), float("inf"), -float("inf"), float("inf")
    torch.testing.assert_close(engine(x), model(x).detach(), **NETWORK, equal_nan=True)


def test_wide_and_narrow_values(tmp_path):
    """More channels than are summed at a time, one channel, one pixel."""
    model = prepared(
        lambda: nn.Sequential(
            nn.Conv2d(1, 150, 3), nn.MaxPool2d(3, 1), nn.AvgPool2d(2, 1), nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(150, 4, 1), nn.PixelShuffle(2), nn.MaxPool2d(2), nn.Upsample(size=(1, 1)),
        )
    )  # fmt: skip
    assert_engine(model, torch.randn(2, 1, 9, 11), [torch.randn(5, 1, 9, 11)], tmp_path)


class Conditional(nn.Module):
    """Takes z and a label: by concatenation, and by gains and biases per class."""

    def __init__(self):
        super().__init__()
        self.embedding, self.table = nn.Embedding(7, 5), nn.Embedding(4, 16)
        self.first = nn.Linear(5 + 6, 8 * 4 * 4)
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.bn, self.norm = nn.BatchNorm1d(8 * 4 * 4), nn.BatchNorm2d(8, affine=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, z, labels, other):
        h = torch.cat([z, self.embedding(labels)], dim=1)
        h = F.relu(self.bn(self.first(h))).view(-1, 8, 4, 4)
        gain, bias = self.table(other)[:, :, None, None].chunk(2, 1)
        h = F.relu(self.norm(self.conv(h)) * (1 + gain) + bias)
        return torch.tanh(self.last(self.gate * F.interpolate(h, scale_factor=2) + 0.5))


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_noise_and_labels(precision, tmp_path):
    def inputs_of(n):
        return torch.randn(n, 6), torch.randint(7, (n,)), torch.randint(4, (n,))

    assert_engine(prepared(Conditional), inputs_of(2), [inputs_of(1), inputs_of(9), inputs_of(0)], tmp_path, precision)


class Discriminator(nn.Module):
    """Takes a label as one more channel of the image and as a one-hot code; returns one number per image."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 64)
        self.conv, self.head = nn.Conv2d(4, 6, 4, 2, 1), nn.Linear(6 + 5, 6)

    def forward(self, labels, x):
        h = self.conv(torch.cat([x, self.embedding(labels).view(-1, 1, 8, 8)], 1))
        code = F.one_hot(labels, 5).to(x.dtype)
        return (self.head(torch.cat([F.leaky_relu(h, 0.2).sum((2, 3)), code], 1)) * h.mean((2, 3))).sum(1)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_labels_come_first_and_a_number_comes_out(precision, tmp_path):
    def inputs_of(n):
        return torch.randint(5, (n,)), torch.rand(n, 3, 8, 8)

    assert_engine(prepared(Discriminator), inputs_of(1), [inputs_of(2), inputs_of(11)], tmp_path, precision)


def test_several_outputs(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = VanillaVAE()

        def forward(self, x):
            return self.vae.encode(x)

    x = torch.rand(3, 3, 16, 16)
    engine = assert_engine(prepared(Encoder), x, [torch.rand(1, 3, 16, 16), torch.rand(20, 3, 16, 16)], tmp_path)
    assert isinstance(engine(x), tuple) and engine.plan.output_shapes == ((5,), (5,))

    class Mixed(nn.Module):
        """Outputs: a value that is also read by a layer, the same value twice, an input, and a flattened value."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x, y):
            a = self.a(x)
            b = self.b(a).relu()
            return b, a, y, (b + a).flatten(1), b

    def inputs_of(n):
        return torch.rand(n, 3, 6, 7), torch.rand(n, 2, 3, 2)

    assert_engine(prepared(Mixed), inputs_of(2), [inputs_of(5)], tmp_path)
    assert_engine(prepared(Mixed), inputs_of(2), [inputs_of(5)], tmp_path, "bf16")


def test_networks_of_this_package_and_of_others(tmp_path):
    for options in ({}, {"generator_norm": "conditional", "condition": "concatenation"}):
        small = {"image_size": 32, "ngf": 8, "ndf": 8, "nz": 7, **options}
        cgan = prepared(lambda: fastgen.create_model("cgan", **small))  # noqa: B023
        inputs = [(torch.randn(n, 7), torch.randint(10, (n,))) for n in (1, 3)]
        assert_engine(cgan.generator, inputs[0], inputs[1:], tmp_path)
        inputs = [(torch.rand(n, 3, 32, 32), torch.randint(10, (n,))) for n in (1, 3)]
        assert_engine(cgan.discriminator, inputs[0], inputs[1:], tmp_path)
    assert_engine(prepared(SNGANGenerator), torch.randn(1, 5), [torch.randn(4, 5)], tmp_path)


def test_wrong_labels_and_inputs_are_named(tmp_path):
    model = prepared(Conditional)
    z, labels, other = torch.randn(3, 6), torch.tensor([0, 6, 2]), torch.tensor([3, 0, 0])
    engine = fastgen.Engine(model, (z, labels, other), impl="cpp")
    engine.save(tmp_path / "a.fgplan")
    plan = Plan.load(tmp_path / "a.fgplan")
    assert [declared.classes for declared in plan.inputs] == [None, 7, 4]
    torch.testing.assert_close(engine(z, labels.int(), other), model(z, labels, other).detach(), **NETWORK)
    for wrong, error, words in (
        ((z,), TypeError, "takes 3 inputs, got 1"),
        (
            (z, labels, torch.tensor([0, 4, 0])),
            IndexError,
            r"inputs\[2\] must be labels from 0 to 3, got 4 for image 1",
        ),
        (
            (z, torch.tensor([0, 1, -1]), other),
            IndexError,
            r"inputs\[1\] must be labels from 0 to 6, got -1 for image 2",
        ),
        ((z, torch.tensor([0, 1, -(2**63)]), other), IndexError, r"inputs\[1\]"),
        ((z, labels.float(), other), TypeError, r"inputs\[1\] must be .*, got (torch\.)?float32"),
        ((z, labels[:, None], other), ValueError, r"inputs\[1\] must be of shape \(N,\), got \(3, 1\)"),
        ((z, labels[:2], other), ValueError, r"inputs\[1\] must have 3 images as inputs\[0\] has, got shape \(2,\)"),
        ((z[:, :5], labels, other), ValueError, r"inputs\[0\] must be of shape \(N, 6\), got \(3, 5\)"),
    ):
        with pytest.raises(error, match=words):
            engine(*wrong)
        with pytest.raises(error, match=words):
            plan(*(x.numpy() for x in wrong))
    with pytest.raises(UsageError, match=r"same batch size, got shapes \(3, 6\), \(2,\)"):
        fastgen.Engine(model, (z, labels[:2]))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: F.interpolate(x, scale_factor=1.3), "to a fraction of a pixel"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "bicubic"),
        (lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), "antialias=True"),
        (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d of"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (lambda x: x[:, ::2], "consecutive channels"),
        (lambda x: x[:, torch.tensor([1, 0, 2])], "by tensors"),
        (lambda x: x[:, :, 1:], "indexing of anything but consecutive channels"),
        (lambda x: x.mean((0, 2, 3), keepdim=True) + x, "mean or sum"),
        (lambda x: {"a": x.relu()}, "a dict"),
        (lambda x: (x.relu(), None), "parts of NoneType, Tensor"),
    ],
)
def test_what_a_plan_cannot_compute_is_named(function, words):
    with pytest.raises(FastgenError, match=words):
        fastgen.Engine(Call(function).eval(), torch.rand(2, 3, 8, 8), impl="cpp")


def test_several_inputs_without_a_plan_run_through_pytorch():
    model = Call(lambda x, labels: x + torch.special.erf(x) * labels[:, None]).eval()
    x, labels = torch.rand(2, 3), torch.tensor([1, 2])
    engine = fastgen.Engine(model, (x, labels))
    assert [part.runs for part in engine.parts] == ["PyTorch"] and torch.equal(engine(x, labels), model(x, labels))
