"""Ways to write a forward, some of them traps: PATTERNS[name] is (make, names in the runs that fuse, reasons why the
others do not), and CALLS[name] has further arguments to call it with."""

import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PATTERNS = {}
CALLS = {}
VALUE = 0.5


class Base(nn.Module):
    """c1 -> b1 -> act and c2 -> b2, which subclasses call; every convolution keeps the shape (N, 4, H, W)."""

    def __init__(self, act=None):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.act = act or nn.ReLU(inplace=True)


def pattern(fused, left=None, make=lambda cls: cls(), calls=()):
    """Registers a class, or a function that makes a module. `fused` are the names in the runs, as "c1 b1 act; c2 b2",
    `calls` a list of (args, kwargs)."""

    def register(cls):
        CALLS[cls.__name__] = calls
        runs = tuple(tuple(run.split()) for run in fused.split(";") if run.strip())
        PATTERNS[cls.__name__] = ((lambda: make(cls)), runs, left or {})
        return cls

    return register


@pattern("c1 b1 act; c2 b2", {})
class Attributes(Base):
    def forward(self, x):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c1 b1; c2 b2", {"act": "no forward calls it"})
class FunctionalActivations(Base):
    def forward(self, x):
        x = F.leaky_relu(self.b1(self.c1(x)), 0.3, inplace=True)
        x = self.b2(self.c2(x)).relu_()
        return torch.tanh(x)


@pattern("c1 b1 act; c2 b2")
class OneRunCalledTwice(Base):
    def forward(self, x):
        for _ in range(2):
            x = self.act(self.b1(self.c1(x)))
        return self.b2(self.c2(x))


@pattern("c1 b1 act; c2 b2 act")
class OneActivationForTwoRuns(Base):
    def forward(self, x):
        return self.act(self.b2(self.c2(self.act(self.b1(self.c1(x))))))


@pattern("c1 b1; c2 b2", {"act": "outside of this run"})
class ActivationAlsoAfterASum(Base):
    def forward(self, x):
        h = self.b2(self.c2(self.act(self.b1(self.c1(x)))))
        return self.act(h + x)


@pattern("", {"c1": "outside of this run", "b1": "outside of this run", "b2": "outside of this run"})
class ConvolutionWithTwoNorms(Base):
    def forward(self, x):
        return self.b1(self.c1(x)) + self.b2(self.c1(x))


@pattern("", {"c1": "outside of this run", "c2": "outside of this run", "b1": "outside of this run"})
class NormOfTwoConvolutions(Base):
    def forward(self, x):
        return self.b1(self.c1(x)) + self.b1(self.c2(x))


@pattern("b1 act", {"c1": "outside of this run", "c2": "outside of this run"})
class NormAndActivationOfTwoConvolutions(Base):
    def forward(self, x):
        return self.act(self.b1(self.c1(x))) + self.act(self.b1(self.c2(x)))


@pattern("c1 b1", {"act": "outside of this run"})
class ActivationAtTimes(Base):
    def forward(self, x, last=False):
        h = self.b1(self.c1(x))
        return h if last else self.act(h)


@pattern("c1 b1; c2 b2", {"act": "comes right before"})
class InPlaceActivationOfAUsedValue(Base):
    def forward(self, x):
        h = self.b1(self.c1(x))
        y = self.act(h)  # y is the same tensor as h
        return self.b2(self.c2(y)) + h


@pattern("c2 b2", {"c1": "used in 2 places"})
class ConvolutionUsedTwice(Base):
    def forward(self, x):
        h = self.c1(x)
        return self.b2(self.c2(self.b1(h) * h.sigmoid()))


@pattern("b1 act", {"c1": "used in 2 places"})
class InPlaceBetween(Base):
    def forward(self, x):
        h = self.c1(x)
        h.mul_(2)
        return self.act(self.b1(h))


@pattern("c1 b1 act; c2 b2")
class BranchOnData(Base):
    def forward(self, x):
        if x.mean() > 0:
            x = x * 2
        assert x.dim() == 4, "images"
        x = self.act(self.b1(self.c1(x)))
        if x.shape[0] < 1:
            raise ValueError(f"no images: {x.shape}")
        return self.b2(self.c2(x))


@pattern("c2 b2; b1 act", {"c1": "used in 2 places"})
class BranchThatSkipsTheNorm(Base):
    def forward(self, x):
        h = self.c1(x)
        if h.mean() > 0:
            h = self.act(self.b1(h))
        return self.b2(self.c2(h))


@pattern("c2 b2; b1 act", {"c1": "used in 2 places"})
class BranchOnTraining(Base):
    def forward(self, x):
        h = self.c1(x)
        if self.training:
            h = h + 0.1 * h.square()
        return self.b2(self.c2(self.act(self.b1(h))))


@pattern("c2 b2", {"c1": "its forward is called"})
class CallsTheForward(Base):
    def forward(self, x):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)) + self.c1.forward(x))))


FEATURES = []


@pattern("c2 b2; b1 act", {"c1": "its output is stored"})
class FeaturesStoredElsewhere(Base):
    def forward(self, x):
        FEATURES[:] = [self.c1(x)]
        return self.b2(self.c2(self.act(self.b1(FEATURES[0]))))


@pattern("c2 b2; b1 act", {"c1": "its output is stored"})
class StoredFeatures(Base):
    def forward(self, x):
        self.features = {"first": [self.c1(x)]}
        y = self.b2(self.c2(self.act(self.b1(self.features["first"][0]))))
        return y + self.features["first"][0]


@pattern("", {"": "random numbers", "c1": "random numbers"})
class RandomBranch(Base):
    def forward(self, x):
        h = self.c1(x)
        if random.random() < 2.0:  # layer drop
            h = self.b1(h)
        return self.act(h)


@pattern("", {"": "cannot be traced", "c1": "it is in ModuleThatDoesNotTrace"})
class ModuleThatDoesNotTrace(Base):
    def forward(self, x):
        for i in range(int(x.shape[0] > 0)):
            x = self.act(self.b1(self.c1(x))) + i
        return x


@pattern("c2 b2", {"c1": "goes to the function sin"})
class ChecksTheType(Base):
    def forward(self, x):
        h = self.c1(x)
        if isinstance(h, torch.Tensor):
            h = h.sin()
        return self.b2(self.c2(self.b1(h)))


@pattern("", {"": "checks whether a value is a Tensor"})
class ChecksTheTypeElsewhere(Base):
    def _finish(self, h):
        return self.b1(h.sin() if torch.is_tensor(h) else h)

    def forward(self, x):
        return self._finish(self.c1(x))


@pattern("c2 b2", {"c1": "checkpoint"})
class Checkpointed(Base):
    def _first(self, x):
        return self.act(self.b1(self.c1(x)))

    def forward(self, x):
        return self.b2(self.c2(checkpoint(self._first, x, use_reentrant=False)))


@pattern("inner.c1 inner.b1 inner.act; inner.c2 inner.b2", {"": "cannot be traced"})
class TracedWithinUntraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attributes()

    def forward(self, x):
        return self.inner(x) * float(x.numel() > 0)


@pattern(
    "inner.c2 inner.b2; inner.b1 inner.act",
    {"inner.c1": "CallsPartsOfAnother.forward uses it too", "": "cannot be traced"},
)
class CallsPartsOfAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attributes()

    def forward(self, x):
        return self.inner(x) + self.inner.c1(x) * float(x.numel() > 0)


@pattern("c2 b2; b1 act", {"c1": "WithAnotherMethod.embed uses it too"})
class WithAnotherMethod(Base):
    def forward(self, x):
        return self._decode(self.act(self.b1(self.c1(x))))

    def _decode(self, h):
        return self.b2(self.c2(h))

    def embed(self, x):
        return self.c1(x).mean((2, 3))

    def reset(self):
        nn.init.zeros_(self.c2.weight)


@pattern("c2 b2; b1 act", {"c1": "WithADecoratedMethod.embed uses it too"})
class WithADecoratedMethod(Base):
    @torch.no_grad()
    def embed(self, x):
        return self.c1(x).mean((2, 3))

    @torch.enable_grad()
    def forward(self, x):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c1 b1 act", {"c2": "used in 2 places"})
class ReadsGradMode(Base):
    def forward(self, x):
        h = self.c2(self.act(self.b1(self.c1(x))))
        return self.b2(h + h.square() if self.training and not torch.is_grad_enabled() else h)


@pattern("c2 b2; b1 act", {"c1": "another function"})
class SplitOverMethods(Base):
    def features(self, x):
        return self.c1(x)

    def forward(self, x):
        return self.b2(self.c2(self.act(self.b1(self.features(x)))))


@pattern("c2 b2; b1 act", {"c1": "another function"})
class FirstWithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            h = self.c1(x)
        return self.b2(self.c2(self.act(self.b1(h))))


@pattern("c1 b1 act", {"c2": "more than its input"})
class OutputSize(Base):
    def forward(self, x):
        h = self.act(self.b1(self.c1(x)))
        return self.b2(self.c2(h, output_size=h.shape[2:]))


class Named(nn.Module):
    """conv1 -> relu -> conv2 -> relu."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))))


@pattern("conv1 relu; conv2 relu")
class NamesAsStrings(Named):  # pytorch/examples super_resolution
    def reset(self):
        getattr(nn.init, self.initialisation)(self.conv1.weight, nn.init.calculate_gain("relu"))
        nn.init.zeros_(self.conv2.bias)


@pattern("", {"conv1": "UsedByName.embed uses it too"})
class UsedByName(Named):
    def embed(self, x):
        return getattr(self, "conv1", None)(x)


@pattern(
    "", {"conv1": "UsedByAnyName.layer uses it too", "conv2": "UsedByAnyName.layer", "relu": "UsedByAnyName.layer"}
)
class UsedByAnyName(Named):
    def layer(self, name, x):
        return getattr(self, name, "conv1")(x)


@pattern("", {"conv1": "UsedByPath.layer uses it too"})
class UsedByPath(Named):
    def layer(self, name, x):
        return self.get_submodule(name)(x)


@pattern("", {"layers.first": "UsedByKey.layer uses it too", "layers.second": "UsedByKey.layer uses it too"})
class UsedByKey(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Conv2d(4, 4, 1), "second": nn.BatchNorm2d(4)})

    def layer(self, name, x):
        return self.layers[name](x)

    def forward(self, x):
        return self.layers["second"](self.layers["first"](x))


@pattern("", {"0": "UsedByIndex.first uses it too"})
class UsedByIndex(nn.ModuleList):
    def __init__(self):
        super().__init__([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])

    def first(self, x):
        return self[0](x)

    def forward(self, x):
        for module in self:
            x = module(x)
        return x
