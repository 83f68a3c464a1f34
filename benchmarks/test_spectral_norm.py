"""Spectral norm in training beside PyTorch's parametrization, eager and compiled, float32; and in a discriminator's
step."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastgen
import fastgen.nn
from fastgen.nn.spectral_norm import undivided
from tests.cases import BIGGAN_128, SPECTRAL_LARGE
from tests.support.tolerance import error

NORMS = {
    "eager": parametrizations.spectral_norm,
    "compile": parametrizations.spectral_norm,
    "fastgen": fastgen.nn.spectral_norm,
}
MODELS = {
    SPECTRAL_LARGE[0].name: [SPECTRAL_LARGE[0].shapes["weight"]],
    "BigGAN-128 discriminator, 12 weights": BIGGAN_128,
}


def layers(shapes, norm):
    torch.manual_seed(0)
    return nn.ModuleList(norm(nn.Conv2d(shape[1], shape[0], shape[2], bias=False)) for shape in shapes)


def normalized(model):
    return [layer.weight for layer in model]


def standing(model):
    """The weights for fused convolutions whose kernels divide by sigma: the undivided weights, with the gradient of
    weight / sigma."""
    return [norm.parts(weight)[0] for norm, weight in map(undivided, model)]


@functools.cache
def oracle(row):
    model = layers(MODELS[row], parametrizations.spectral_norm).double().eval()
    with torch.no_grad():
        return model[0].weight


def accesses(model, group, originals, upstream, normalized):
    if group is not None:
        group.update()  # as after each step of the optimizer
    if upstream is None:
        with torch.no_grad():
            normalized(model)
    else:
        torch.autograd.grad(normalized(model), originals, upstream)


@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
@pytest.mark.parametrize("what", ("forward", "forward + backward"))
@pytest.mark.parametrize("row", MODELS)
def test_access(row, what, fused, measure):
    """fused: everything that spectral norm does if the convolutions divide their sums by sigma."""
    torch._dynamo.reset()
    calls, facts = {}, {}
    for peer in ("eager", "compile", *(() if fused else ("fastgen",)), "fastgen group"):
        model = layers(MODELS[row], NORMS[peer.split()[0]])
        with torch.no_grad():
            worst = error(model.eval()[0].weight, oracle(row))
        model.train()
        originals = [layer.parametrizations.weight.original for layer in model]
        upstream = [torch.randn_like(weight) for weight in originals] if "backward" in what else None
        group = fastgen.nn.SpectralNormGroup(model) if peer == "fastgen group" else None
        access = torch.compile(normalized) if peer == "compile" else normalized
        access = standing if fused and group is not None else access
        calls[peer] = functools.partial(accesses, model, group, originals, upstream, access)
        facts[peer] = {"error": worst, "correct": worst < 1e-5}
    # W for the iteration, W and its quotient; then the gradient and W for their product, the gradient again and the
    # result.
    passes = (1 if fused else 3) + (4 if what != "forward" else 0)
    table = "spectral_norm, access of fused convolutions in training" if fused else "spectral_norm, access in training"
    measure(calls, facts, table=table, row=f"{row}, {what}", bytes=passes * sum(w.numel() for w in originals) * 4)


@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
def test_discriminator_step(fused, measure):
    """D(real) and D(fake), backward and Adam, DCGAN-64, batch 64: what spectral norm adds to the step without it.

    fused: in SNGAN's form, without BatchNorm, where sigma is a factor in the convolutions' epilogues.
    """
    real, fake = torch.randn(2, 64, 3, 64, 64)
    calls, facts = {}, {}
    for peer in ("without", *(() if fused else ("eager",)), "fastgen", "fastgen group"):
        torch.manual_seed(0)
        model = fastgen.create_model("dcgan").discriminator
        if fused:
            model = nn.Sequential(*(layer for layer in model.main if not isinstance(layer, nn.BatchNorm2d)))
        if peer != "without":
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    NORMS[peer.split()[0]](module)
        if fused:
            model = fastgen.fuse(model)
        if peer == "fastgen group":
            fastgen.nn.SpectralNormGroup(model)
        optimizer = torch.optim.Adam(model.parameters(), 2e-4)
        calls[peer] = functools.partial(discriminator_step, model, optimizer, real, fake)
        facts[peer] = {"error": 0.0, "correct": True}
    measure(
        calls,
        facts,
        table="DCGAN-64 discriminator, training step",
        row="batch 64, no BatchNorm, fused" if fused else "batch 64",
    )


def discriminator_step(model, optimizer, real, fake):
    optimizer.zero_grad()
    (model(fake).mean() - model(real).mean()).backward()
    optimizer.step()
