"""Engine's check accepts rounding errors. It refuses faults, changing state, and code that depends on the number of
images."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.errors import FastgenError
from fastgen.inference import _compare
from fastgen.inference._compare import changes, compare
from fastgen.inference._readers import UnsupportedError
from tests.inference.parity import FEW_LAYERS, FLOOR, NETWORK, prepared, relative_error
from tests.inference.test_engine import Decoder
from tests.support.networks import ResnetGenerator, VanillaVAE

PRECISIONS = ("fp32", "bf16")


class Stateful(nn.Module):
    """A convolution, then `step(module, output)`."""

    def __init__(self, step):
        super().__init__()
        self.conv, self.step = nn.Conv2d(3, 8, 3), step
        self.register_buffer("calls", torch.zeros(()))
        self.gain, self.number, self.kept = torch.ones(8, 1, 1), 0, {"array": np.zeros(1), "list": [torch.zeros(1)]}

    def forward(self, x):
        return self.step(self, self.conv(x))


def counts(m, y):
    m.calls += 1
    return y * (1 + 0.01 * float(m.calls))


def replaces(m, y):
    m.gain = m.gain * 1.001
    return y


def parameter(m, y):
    m.conv.weight.data *= 0.999
    return y


def number(m, y):
    m.number += 1
    return y


def array(m, y):
    m.kept["array"][0] += 1
    return y


def in_list(m, y):
    m.kept["list"][0].add_(1)
    return y


def caches(m, y):
    m.last, m.filled = y, True
    return y


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("step", "name"),
    [
        (counts, "calls"),
        (replaces, "gain"),
        (parameter, "conv.weight"),
        (number, "number"),
        (array, "kept"),
        (in_list, "kept"),
    ],
)
def test_a_state_that_changes_in_evaluation_mode(step, name, precision):
    model, x = nn.Sequential(Stateful(step), nn.Conv2d(8, 4, 1), nn.Tanh()).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(FastgenError, match=rf"0\.{name} changes with every call"):
        fastgen.Engine(model, x, precision=precision, impl="cpp")
    engine, twin = fastgen.Engine(model, x, precision=precision), copy.deepcopy(model)
    assert [part.runs for part in engine.parts if part.name == "1 to 2"] == ["plan"]  # the others are still plans
    for _ in range(30):
        expected, found = twin(x).detach(), engine(x)
    assert relative_error(found, expected.double()) < FLOOR[precision]


def test_a_buffer_that_is_filled_once_is_not_changing_state():
    model = Stateful(caches).eval()
    assert fastgen.Engine(model, torch.randn(2, 3, 8, 8), impl="cpp").plan is not None and not hasattr(model, "last")

    class Initialised(nn.Module):
        """Initialises itself from its first input, as ActNorm does. The engine must not do that with its own input."""

        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 8, 3), None

        def forward(self, x):
            y = self.conv(x)
            if self.scale is None:
                self.scale = float(np.std(y.tolist()))
            return y * (1 / self.scale)

    with pytest.raises(FastgenError):
        fastgen.Engine(Initialised().eval(), torch.randn(2, 3, 8, 8), impl="cpp")


def test_spectral_norm_that_iterates_in_evaluation_mode():
    """As in heykeetae/Self-Attention-GAN: a plan's error in bfloat16 would be 20 % after 30 calls."""

    class Normalized(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.bar = module, nn.Parameter(module.weight.data.clone())
            del module._parameters["weight"]
            self.u, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(27))

        def forward(self, x):
            weight = self.bar.flatten(1)
            self.v.data = F.normalize(weight.data.t() @ self.u, dim=0)
            self.u.data = F.normalize(weight.data @ self.v, dim=0)
            self.module.weight = self.bar / (self.u @ weight @ self.v)
            return self.module.forward(x)

    model, x = nn.Sequential(Normalized(nn.Conv2d(3, 8, 3)), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    for precision in PRECISIONS:
        twin, engine = copy.deepcopy(model), fastgen.Engine(model, x, precision=precision)
        assert "changes with every call" in engine.parts[0].reason
        for _ in range(30):
            expected, found = twin(x), engine(x)
        assert torch.equal(found, expected)


FAULT = {"fp32": 1e-3, "bf16": 0.06}  # of one weight: about twice the difference that rounding everything makes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_faults_are_told_from_rounding(precision):
    """A slightly wrong weight is refused, and the right one is not."""
    torch.manual_seed(0)
    model = ResnetGenerator(8, 2).eval()
    x, size = (torch.rand(2, 3, 16, 16) * 2 - 1,), FAULT[precision]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrong = copy.deepcopy(model)
    wrong.model[4].weight *= 1 + size * torch.randn_like(wrong.model[4].weight)
    for compared, passes in ((model, True), (wrong, False)):
        engine = fastgen.Engine(compared, x[0], precision=precision, impl="cpp")
        if passes:
            compare(engine, model, x, precision, (4, 2, 1))
        else:
            with pytest.raises(UnsupportedError, match=r"differs from the module's by .* rounding explains"):
                compare(engine, model, x, precision, (4, 2, 1))
    with pytest.raises(UnsupportedError, match="non-finite"):
        compare(lambda x: model(x) / 0, model, x, precision, (1,))


TRUE_BFLOAT16 = {
    "dcgan-64": lambda: (fastgen.create_model("dcgan", nz=20, ngf=8).generator, (20,)),
    "resnet-9, instance norm": lambda: (ResnetGenerator(8, 9), (3, 32, 32)),
    "vae decoder": lambda: (Decoder(VanillaVAE(16, (8, 16, 32))), (16,)),
    "one number": lambda: (nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1)), (3, 8,
    8)),
}  # fmt: skip


MAX_ERROR_BF16 = 0.05  # 25 roundings, which these networks' layers amplify


@pytest.mark.parametrize("name", TRUE_BFLOAT16)
def test_networks_in_bfloat16_pass_as_they_are_and_trained(name):
    for make in (lambda: TRUE_BFLOAT16[name]()[0].eval(), lambda: prepared(lambda: TRUE_BFLOAT16[name]()[0])):
        torch.manual_seed(1)
        engine = fastgen.Engine(make(), torch.randn(1, *TRUE_BFLOAT16[name]()[1]), precision="bf16", impl="cpp")
        assert engine.error < MAX_ERROR_BF16


def test_the_rounding_bound_is_near_pytorchs_bfloat16_error():
    """The bound, measured in float32 with rounded values, is near the error of real bfloat16 kernels."""
    torch.manual_seed(0)
    model, x = ResnetGenerator(8, 4).eval(), torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu"):
            expected = relative_error(model(x), exact.double())
        (rounded,) = _compare._rounded_outputs(model, [(x,)], 7)[0]
    assert 0.5 < relative_error(rounded, exact.double()) / expected < 2


def test_rounding_is_to_the_nearest_even():
    x = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1 + 2**-8, 1 + 3 * 2**-8])
    for value in (x, special):
        rounded = value.clone()
        _compare._round(rounded, 7)
        torch.testing.assert_close(rounded, value.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_compared_images_have_the_examples_values():
    x, labels = torch.randn(2, 3, 4, 5), torch.tensor([3, 1])
    for n in (1, 2, 4, 17):
        images = _compare.images_like(x, n)
        assert images.shape == (n, 3, 4, 5) and (n < 2 or torch.equal(images[-2:], x))
        for i in range(n):
            assert torch.equal(images[i].flatten(1).sort().values, x[(i - n) % 2].flatten(1).sort().values)
        assert set(_compare.images_like(labels, n).tolist()) <= {1, 3}
    assert len(_compare.images_like(x, 17).unique(dim=0)) == 17


class OfBatch(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x):
        return self.function(self.conv(x), x)


LOOKS = {
    "shape": lambda y, x: y if x.shape[0] <= 8 else y * 2,
    "size": lambda y, x: y if x.size(0) <= 100 else y.relu(),
    "len": lambda y, x: y if len(x) != 5 else y + 1,
    "numel": lambda y, x: y if y.numel() < 20 * 4 * 36 else y * 2,
    "unpacked": lambda y, x: y * (1 / x.size()[0]),
    "a constant": lambda y, x: y * torch.full((1,), float(len(x))),
    "a view": lambda y, x: y.view(2, -1, 6, 6) if x.shape[0] == 2 else y,
    "raises": lambda y, x: y if x.shape[0] < 4 else None.missing,
    "one more": lambda y, x: y if len(x) < 1000 else y[:, :3],
    "fewer": lambda y, x: y.relu() if len(x) < 600 else y,
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_forward_that_depends_on_the_batch_size(name):
    model, x = OfBatch(LOOKS[name]).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(FastgenError, match=r"(images than for 2|takes 2 images, but not|differs|but the module)"):
        fastgen.Engine(model, x, impl="cpp")
    engine = fastgen.Engine(model, x)
    assert [part.runs for part in engine.parts] == ["PyTorch", "plan"][: 1 if name == "raises" else 2]
    for n in (1, 3, 5, 9, 40):
        inputs = torch.randn(n, 3, 8, 8)
        if name != "raises" or n < 4:
            torch.testing.assert_close(engine(inputs), model(inputs).detach(), **NETWORK)


LOOKS_AT_NOTHING_ELSE = {
    "a view": lambda y, x: y.view(x.shape[0], -1).view(len(x), 4, 6, 6),
    "a size": lambda y, x: F.interpolate(y, size=x.shape[2:]),
    "a check": lambda y, x: y if x.shape[0] == y.shape[0] and x.size(1) == 3 else None,
    "parts": lambda y, x: torch.cat([z.relu_() for z in y.detach().chunk(2, 1)], 1) if len(y) else y,
    "in place": lambda y, x: (y.contiguous().mul_(2), y.add_(len(x) * 0))[1],
}


@pytest.mark.parametrize("name", LOOKS_AT_NOTHING_ELSE)
def test_a_forward_that_reads_the_batch_size_without_effect(name):
    model, x = OfBatch(LOOKS_AT_NOTHING_ELSE[name]).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        if name == "parts":  # plans do not write to views
            with pytest.raises(FastgenError, match="in place on a view"):
                fastgen.Engine(model, x, impl="cpp")
            return
        engine = fastgen.Engine(model, x, impl="cpp")
        for n in (1, 5, 40):
            inputs = torch.randn(n, 3, 8, 8)
            torch.testing.assert_close(engine(inputs), model(inputs), **NETWORK)


def test_a_module_that_refuses_some_batch_sizes():
    """Batch norm with the batch's statistics refuses a single vector."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    engine = fastgen.Engine(model, torch.randn(2, 3))
    assert engine.parts[0].reason.startswith("it takes 2 images, but not 1: Expected more than 1 value")
    for call in (engine, lambda x: fastgen.Engine(model, x)):
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            call(torch.randn(1, 3))


def test_modules_that_write_into_their_input():
    model, x = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    before = x.clone()
    assert changes(copy.deepcopy(model), (x,)) == {}
    engine = fastgen.Engine(model, x, impl="cpp")
    assert torch.equal(x, before)
    torch.testing.assert_close(engine(x), model(x.clone()).detach(), **FEW_LAYERS)


def test_the_reason_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "fastgen"):
        fastgen.Engine(Stateful(counts).eval(), torch.randn(1, 3, 8, 8))
    assert len(caplog.records) == 1 and "calls changes with every call" in caplog.text


NOISE = {
    "rand of one": lambda x: x + torch.rand(1),
    "a scalar": lambda x: x * torch.rand(()),
    "item": lambda x: x * (1 + torch.rand(1).item()),
    "random": lambda x: x * (1 + random.random()),
    "numpy": lambda x: x * (1 + float(np.random.rand())),
    "small": lambda x: x + 1e-7 * torch.rand(1),
}


class Noisy(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.conv, self.noise = nn.Conv2d(3, 4, 3), noise

    def forward(self, x):
        return self.noise(self.conv(x))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("noise", NOISE)
def test_noise_is_not_frozen(noise, precision):
    """In a plan, a number that is drawn at every call would become a constant. The other modules become plans."""
    model = Noisy(NOISE[noise]).eval()
    x = torch.randn(2, 3, 8, 8)
    engine = fastgen.Engine(model, x, precision=precision)
    assert str(engine.parts[0]) == "the model: PyTorch (it draws random numbers, also in evaluation mode)"
    assert [(part.name, part.runs) for part in engine.parts[1:]] == [("conv", "plan")]
    assert noise == "small" or not torch.equal(engine(x), engine(x))
