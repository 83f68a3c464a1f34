"""Whole networks in training: models of other projects under fuse, beside eager PyTorch and torch.compile, in both
memory formats."""

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from benchmarks.memory import peak_mebibytes
from tests.support.networks import DCGANDiscriminator, DCGANGenerator, ResnetGenerator, VanillaVAE

PEERS = {"eager": {}, "compile": {}, "fastgen": {}, "fastgen memory_efficient": {"memory_efficient": True}}
PRECISIONS = ("fp32", "bf16")


class GAN(nn.Module):
    """pytorch/examples' DCGAN at 64 pixels, batch 64: a step of both networks."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = DCGANGenerator(100, 64), DCGANDiscriminator(64, 64)
        self.discriminator.main = self.discriminator.main[:-1]  # the sigmoid is in the loss
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)

    def inputs(self, n: int = 64) -> list[Tensor]:
        return [torch.rand(n, 3, 64, 64) * 2 - 1, torch.randn(n, 100, 1, 1)]

    def losses(self, real: Tensor, z: Tensor, autocast: Callable):
        """The losses, each with the network that it trains."""
        with autocast():
            fake = self.generator(z)
            right, wrong = self.discriminator(real), self.discriminator(fake.detach())
            yield self.discriminator, F.softplus(-right.float()).mean() + F.softplus(wrong.float()).mean()
        with autocast():
            yield self.generator, F.softplus(-self.discriminator(fake).float()).mean()


class CycleGAN(nn.Module):
    """The ResNet-9 generator at 128x128, batch 1."""

    def __init__(self):
        super().__init__()
        self.generator = ResnetGenerator(64, 9)

    def inputs(self) -> list[Tensor]:
        return [torch.rand(1, 3, 128, 128) * 2 - 1]

    def losses(self, x: Tensor, autocast: Callable):
        with autocast():
            yield self.generator, (self.generator(x).float() - x).abs().mean()


class VAE(nn.Module):
    """The conv VAE at 64 pixels, batch 64, without its noise, so that results can be compared."""

    def __init__(self):
        super().__init__()
        self.vae = VanillaVAE(128, (32, 64, 128, 256, 512))

    def inputs(self) -> list[Tensor]:
        return [torch.rand(64, 3, 64, 64) * 2 - 1]

    def losses(self, x: Tensor, autocast: Callable):
        with autocast():
            mu, logvar = self.vae.encode(x)
            found = self.vae.decode(mu)
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).float().sum(1).mean()
            yield self.vae, (found.float() - x).square().mean() + 2.5e-4 * kl


FORWARD_BACKWARD = "CycleGAN ResNet-9 forward + backward, 128x128, batch 1"  # without the optimizer
WORK = {
    "DCGAN-64 training step, batch 64": GAN,
    FORWARD_BACKWARD: CycleGAN,
    "conv VAE-64 training step, batch 64": VAE,
}


@functools.cache
def model_of(work: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = WORK[work]()
    return model, model.inputs()


def prepared(model: nn.Module, peer: str, mode: str | None = None) -> None:
    """Replaces the children by the peer's. mode: torch.compile's."""
    for name, child in list(model.named_children()):
        if peer == "compile":
            child.compile(mode=mode)
        elif peer != "eager":
            setattr(model, name, fastgen.fuse(child, **PEERS[peer]))


def stepper(
    model: nn.Module, inputs: list[Tensor], precision: str, optimize: bool = True
) -> Callable[[bool], list[Tensor]]:
    """step(train): one training step; without `train` the gradients of its losses, and no weight moves."""
    optimizers = {
        child: torch.optim.Adam(child.parameters(), 2e-4, (0.5, 0.999), fused=True) for child in model.children()
    }
    autocast = functools.partial(torch.autocast, inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(train: bool = True) -> list[Tensor]:
        found = []
        for network, loss in model.losses(*inputs, autocast):
            optimizers[network].zero_grad()
            loss.backward()
            if train and optimize:
                optimizers[network].step()
            elif not train:
                found += [loss.detach(), *(p.grad.clone() for p in network.parameters())]
        return found

    return step


# In fp32 a value that rounding moves across an activation's kink changes the result by up to 1e-3.
def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative L2 error of all gradients together."""
    square = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (square / sum(b.square().sum() for b in exact)).sqrt().item()


@functools.cache
def reference(work: str) -> tuple[list[Tensor], int]:
    """Gradients in float64, and the work in floating-point operations."""
    model, inputs = model_of(work)
    exact = stepper(copy.deepcopy(model).double(), [t.double() for t in inputs], "fp32")(False)
    with FlopCounterMode(display=False) as counter:
        stepper(copy.deepcopy(model), inputs, "fp32")(False)
    return exact, counter.get_total_flops()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("work", WORK)
def test_training_of_networks(work, precision, measure):
    exact, flops = reference(work)
    allowed = 5e-3
    if precision == "bf16":
        allowed = 2 * distance(stepper(copy.deepcopy(model_of(work)[0]), model_of(work)[1], precision)(False), exact)
    torch._dynamo.reset()
    calls, facts = {}, {}
    for peer, layout in itertools.product(PEERS, (torch.contiguous_format, torch.channels_last)):
        model = copy.deepcopy(model_of(work)[0]).to(memory_format=layout)
        inputs = [t.contiguous(memory_format=layout) for t in model_of(work)[1]]
        prepared(model, peer)
        step = stepper(model, inputs, precision, optimize=work != FORWARD_BACKWARD)
        worst = distance(step(False), exact)
        column = f"{peer} {'channels_last' if layout == torch.channels_last else 'contiguous'}"
        calls[column] = step
        facts[column] = {"error": worst, "correct": worst < allowed, "mebibytes": peak_mebibytes(step)}
    for _ in range(5):  # in turns, as they will be measured, until the size of their shared heap is stable
        for step in calls.values():
            step()
    measure(calls, facts, 9, table=work, row=precision, flops=flops)
