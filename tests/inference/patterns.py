"""Ways to write a forward, among them traps: PATTERNS[name] is (make, names in the runs that fuse, why others do not),
and CALLS[name] what it is called with besides its input."""

import random
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PATTERNS = {}
CALLS = {}
VALUE = 0.5


class Base(nn.Module):
    """c1 -> b1 -> act and c2 -> b2, to be called in some way; every convolution keeps the shape (N, 4, H, W)."""

    def __init__(self, act=None):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.act = act or nn.ReLU(inplace=True)


def pattern(fused, left=None, make=lambda cls: cls(), calls=()):
    """Registers a class, or function that makes a module; `fused` is "c1 b1 act; c2 b2", `calls` of (args, kwargs)."""

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
        y = self.act(h)  # h is y now
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


@pattern(
    "c2 b2; b1 act",
    {"c1": "goes to the function mul"},
    calls=[((VALUE,), {}), ((None,), {"return_features": True})],
)
class OptionalArguments(Base):
    def forward(self, x, scale=None, *, return_features=False):
        h = self.c1(x)
        if scale is not None:
            h = h * scale
        y = self.act(self.b1(h))
        y = self.b2(self.c2(y))
        return (y, h) if return_features else y


@pattern("c1 b1 act; c2 b2")
class ArgumentsOfAnyNumber(Base):
    def forward(self, x, *args, **kwargs):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


ANY_ARGUMENTS = [
    ((None,), {}), ((VALUE, 2), {}), ((), {"scale": VALUE}), ((), {"scale": None}), ((), {"a": 1})
]  # fmt: skip


@pattern("c1 b1 act; c2 b2", calls=ANY_ARGUMENTS)
class ArgumentsCounted(Base):  # diffusers' blocks
    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            self.is_deprecated = True
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c1 b1 act", {"c2": "goes to the function mul"}, calls=ANY_ARGUMENTS)
class ArgumentsUsed(Base):
    def forward(self, x, *args, **kwargs):
        h = self.c2(self.act(self.b1(self.c1(x))))
        try:
            return h * args[1]
        except IndexError:
            scale = kwargs.pop("scale", 2.0)
            return self.b2(h if scale is None else h * scale)


@pattern(
    "c2 b2; b1 act",
    {"c1": "goes to the function mul"},
    calls=[((None,), {}), ((None, None), {}), ((VALUE, None), {})],
)
class NoneWhereThereIsNoSuchDefault(Base):
    def _double_without(self, h, by):
        return h * 2 if by is None else h

    def forward(self, x, by=2.0, and_by=3.0):
        h = self._double_without(self._double_without(self.c1(x), by), and_by)
        return self.b2(self.c2(self.act(self.b1(h))))


@pattern("c1 b1 act; c2 b2", {}, calls=[((VALUE,), {}), ((), {"y": None})])
class LabelThatANormDoesNotTake(Base):  # mimicry's blocks, whose norms may be conditional
    def _without(self, x):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))

    def _with(self, x, y):
        return self.b2(self.c2(self.act(self.b1(self.c1(x), y))), y=y)

    def forward(self, x, y=None):
        return self._without(x) if y is None else self._with(x, y)


@pattern("c1 b1 act; c2 b2", {}, calls=[((VALUE,), {})])
class RefusalBeforeOtherCalls(Base):
    def forward(self, x, y=None):
        if y is not None:
            return self.act(self.b1(self.c1(x), y)) + self.c2(x)
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c2 b2; b1 act", {"c1": "goes to the function mul"}, calls=[((VALUE,), {})])
class RefusalThatIsCaught(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        try:
            h = self.b1(h, y) if y is not None else self.b1(h)
        except TypeError:
            h = self.b1(h * y)
        return self.b2(self.c2(self.act(h)))


@pattern("c2 b2", {"c1": "goes to the function add"}, calls=[(([],), {}), (("text",), {})])
class KindsOfArguments(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        if isinstance(y, (list, str)):
            h = h + len(y)
        return self.b2(self.c2(self.b1(h)))


@pattern("", {"": "converts a value to a Python number"}, calls=[((VALUE,), {}), (("text",), {})])
class NumbersOfArguments(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        try:
            return self.b1(h * float(y))
        except (TypeError, ValueError):
            return self.b1(h)


@pattern("", {"": "looks it up in a dictionary"}, calls=[(("double",), {})])
class SetsOfArguments(Base):
    def forward(self, x, mode="single"):
        h = self.c1(x)
        return self.b1(h * 2 if mode in {"double", "twice"} else h)


@pattern("", {"": "it asks what mode is"}, calls=[((True,), {}), ((None,), {})])
class AsksWhatAnArgumentIs(Base):
    def forward(self, x, mode=False):
        h = self.c1(x)
        return self.b1(h * 2 if mode is True else h)


@pattern("", {"": "cannot be traced: TypeError"}, calls=[((VALUE,), {})])
class RaisesForATracedValue(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        return self.b1(h if y is None else h * float(Fraction(y)))


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
class AsksForTheType(Base):
    def forward(self, x):
        h = self.c1(x)
        if isinstance(h, torch.Tensor):
            h = h.sin()
        return self.b2(self.c2(self.b1(h)))


@pattern("", {"": "asks whether a value is a Tensor"})
class AsksForTheTypeElsewhere(Base):
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
class AsksForGradients(Base):
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
