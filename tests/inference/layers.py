"""Kinds of layers and containers, added to PATTERNS."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from tests.inference.argument_patterns import PATTERNS
from tests.inference.patterns import Attributes, pattern

__all__ = ["PATTERNS"]


@pattern("layers.0.0 layers.0.1 act; layers.1.0 layers.1.1 act")
class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]) for _ in range(2))
        self.act = nn.LeakyReLU(0.3)

    def forward(self, x):
        for convolution, norm in self.layers:
            x = self.act(norm(convolution(x)))
        return x


@pattern("main.0 main.1 main.2; main.3 main.4")
class TapsASequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()
        )

    def forward(self, x):
        features = []
        for i, layer in enumerate(self.main):
            x = layer(x)
            if i in (2, 4):
                features.append(x)
        return [*features, x]


class ConvNormAct(nn.Sequential):
    def __init__(self, channels, act):
        super().__init__(nn.Conv2d(4, channels, 3, padding=1), nn.GroupNorm(2, channels), act)


@pattern("0.0 0.1 0.2; 2.0 2.1 2.2")
def subclass_of_sequential():
    return nn.Sequential(ConvNormAct(4, nn.SiLU()), nn.Dropout(0.5), ConvNormAct(4, nn.Tanh()))


@pattern("0.0.0 0.0.1 0.1; 1.0 2.0")
def runs_across_sequentials():
    first = nn.Sequential(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4, 0.8)), nn.LeakyReLU(0.2))
    return nn.Sequential(first, nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Sequential(nn.Identity()), nn.Sequential())


@pattern("0 1 2")
def one_sequential_in_two_places():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True))
    return nn.Sequential(*block, nn.MaxPool2d(1), *block, nn.MaxPool2d(1), block)


@pattern("0 1; 4 5", {"3": "no activation or norm", "6": "no activation or norm", "7": "no op computes a PReLU"})
def dropout_between():  # the order and eps of PyTorch-GAN's discriminator
    return nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.2), nn.Dropout2d(0.25), nn.BatchNorm2d(4, 0.8), nn.Conv2d(4, 4, 3),
        nn.LeakyReLU(0.2), nn.BatchNorm2d(4, 0.8), nn.PReLU(),
    )  # fmt: skip


@pattern("0 1 2; 3 4 5; 6 7")
def unusual_norms():
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.SiLU(),
        nn.BatchNorm2d(4, eps=0.8, momentum=0.3), nn.LeakyReLU(0.4, True),
    )  # fmt: skip


@pattern("0 1 2; 4 5", {"3": "no op computes a Conv2d"})
def padding_modes():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4), nn.ReLU(True),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.Sigmoid(),
    )  # fmt: skip


@pattern("0 1; 2 3 4")
def frozen_and_tied():
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    )
    model[2].weight = model[0].weight
    model[3].bias = model[1].bias
    model[0].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    return model


@pattern("c1 b1 act; c2 b2", make=lambda cls: parametrize(cls()))
class Parametrized(Attributes):
    pass


def parametrize(model):
    parametrizations.spectral_norm(model.c1)
    parametrizations.weight_norm(model.c2)
    parametrizations.spectral_norm(model.b1)
    return model


@pattern("c1 b1 act; c2 b2", make=lambda cls: hooks_that_compute_weights(cls()))
class HooksThatComputeWeights(Attributes):
    pass


def hooks_that_compute_weights(model):
    spectral_norm(model.c1, n_power_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated
        weight_norm(model.c2)
    prune.random_unstructured(model.c2, "bias", 0.5)
    return model


@pattern("0 1; 2 3 4")
def hooks_that_compute_weights_in_a_sequential():
    model = hooks_that_compute_weights(Attributes())
    return nn.Sequential(model.c1, model.act, model.c2, model.b2, nn.Tanh())


@pattern("c2 b2", {"c1": "hooks", "b1": "hooks"}, make=lambda cls: normalized_norm(cls()))
class HooksThatComputeOtherWeights(Attributes):
    pass


def normalized_norm(model):
    prune.l1_unstructured(model.b1, "weight", 0.5)
    model.c1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return model


@pattern("c2 b2", {"b1": "hooks", "c1": "no activation or norm that can be fused"}, make=lambda cls: hooked(cls()))
class Hooked(Attributes):
    pass


def hooked(model):
    model.b1.register_forward_hook(lambda module, args, output: output * 2)
    return model


@pattern("c2 b2", {"b1": "a replaced forward", "act": "no convolution"}, make=lambda cls: replaced(cls()))
class ReplacedForward(Attributes):
    pass


def replaced(model):
    model.b1.forward = torch.sin
    return model


@pattern("c2 b2", {"c1": "ScaledConv is a subclass of Conv2d", "b1": "no activation or norm"})
class Subclasses(Attributes):
    def __init__(self):
        super().__init__(act=Swish())
        self.c1 = ScaledConv(4, 4, 1)


class ScaledConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 3


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@pattern("", {"1": "no op computes a Conv1d", "3": "no convolution or norm", "4": "no op computes a GELU"})
def nothing_fuses():
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 1), nn.Linear(36, 6), nn.ReLU(), nn.GELU())


def iterated(model):
    """The module after some iterations of the old spectral norm. With its initial random vectors sigma may be near 0,
    and outputs in the thousands."""
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(2, 3, 8, 8))
    return model
