"""Spectral norm in training beside PyTorch's parametrization, eager and compiled, float32; and in a discriminator's step."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastgen
import fastgen.nn
from tests.cases import BIGGAN_128, SPECTRAL_LARGE
from tests.ops.test_cases import error

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


@functools.cache
def oracle(row):
    model = layers(MODELS[row], parametrizations.spectral_norm).double().eval()
    with torch.no_grad():
        return model[0].weight


@pytest.mark.parametrize("peer", ("eager", "compile", "fastgen", "fastgen group"))
@pytest.mark.parametrize("what", ("forward", "forward + backward"))
@pytest.mark.parametrize("row", MODELS)
def test_access(row, what, peer, measure):
    torch._dynamo.reset()
    model = layers(MODELS[row], NORMS[peer.split()[0]])
    with torch.no_grad():
        worst = error(model.eval()[0].weight, oracle(row))
    model.train()
    originals = [layer.parametrizations.weight.original for layer in model]
    upstream = [torch.randn_like(weight) for weight in originals]
    call = torch.compile(normalized) if peer == "compile" else normalized
    group = fastgen.nn.SpectralNormGroup(model) if peer == "fastgen group" else None

    def run():
        if group is not None:
            group.update()  # as after each step of the optimizer
        if what == "forward":
            with torch.no_grad():
                call(model)
        else:
            torch.autograd.grad(call(model), originals, upstream)

    facts = {"flops": 0, "error": worst, "correct": worst < 1e-5}
    measure(
        run,
        5 if len(originals) > 1 else 30,
        table="spectral_norm, access in training",
        row=f"{row}, {what}",
        column=peer,
        **facts,
    )


@pytest.mark.parametrize("peer", ("without", "eager", "fastgen", "fastgen group"))
def test_discriminator_step(peer, measure):
    """D(real) and D(fake), backward and Adam, DCGAN-64, batch 64: what spectral norm adds to the step without it."""
    torch.manual_seed(0)
    model = fastgen.create_model("dcgan").discriminator
    if peer != "without":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                NORMS[peer.split()[0]](module)
    if peer == "fastgen group":
        fastgen.nn.SpectralNormGroup(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    real, fake = torch.randn(2, 64, 3, 64, 64)

    def run():
        optimizer.zero_grad()
        (model(fake).mean() - model(real).mean()).backward()
        optimizer.step()

    facts = {"flops": 0, "error": 0.0, "correct": True}
    measure(run, 5, table="DCGAN-64 discriminator, training step", row="batch 64", column=peer, **facts)
