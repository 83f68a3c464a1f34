"""Rows of the sampler and of spectral norm on a GPU, in training, float32."""

import functools
import math
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_parity import tiers
from benchmarks.gpu_session import milliseconds, tier_of
from benchmarks.traffic import H200, Work
from fastgen import nn, ops
from tests.cases import BIGGAN_128
from tests.support.tolerance import error

NOISE = 1 << 24  # elements of the sampler's row


def sampler(scratch: torch.Tensor) -> Iterator[dict]:
    mu, logvar = (torch.randn(NOISE // 1024, 1024, device="cuda").requires_grad_() for _ in range(2))

    def eager(mu, logvar):
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
        return mu + (0.5 * logvar).exp() * torch.randn_like(logvar), kl

    calls = {"eager": eager, "max-autotune": torch.compile(eager, mode="max-autotune-no-cudagraphs")}
    calls |= {f"fastgen {tier}": functools.partial(ops.reparameterize_kl, impl=tier) for tier in _able()}
    upstream = [torch.randn_like(mu), torch.randn(len(mu), device="cuda")]
    for peer, call in calls.items():
        kl = call(mu, logvar)[1].detach()
        worst = error(kl, eager(mu.detach().double(), logvar.detach().double())[1])
        facts = {"case": "reparameterize_kl", "batch": len(mu), "dtype": "torch.float32", "peer": peer}

        def run(backward: bool, call=call, peer=peer):
            with torch.set_grad_enabled(backward), ops.use_impl(tier_of(peer)):
                out = call(mu, logvar)
                if backward:
                    torch.autograd.grad(out, (mu, logvar), upstream)

        for found in _passes(run, 12 * NOISE, 32 * NOISE, scratch):
            yield facts | found | {"error": worst, "correct": worst < 1e-5}


def spectral_norm(scratch: torch.Tensor) -> Iterator[dict]:
    def layers(norm):
        torch.manual_seed(0)
        convolutions = [torch.nn.Conv2d(s[1], s[0], s[2], bias=False, device="cuda") for s in BIGGAN_128]
        return torch.nn.ModuleList(norm(convolution) for convolution in convolutions)

    def accesses(model):
        return [layer.weight for layer in model]

    size = 4 * sum(math.prod(shape) for shape in BIGGAN_128)
    parametrization = torch.nn.utils.parametrizations.spectral_norm
    exact = None
    for peer in ("eager", "max-autotune", *(f"fastgen {tier}" for tier in _able())):
        model = layers(nn.spectral_norm if "fastgen" in peer else parametrization)
        group = nn.SpectralNormGroup(model) if "fastgen" in peer else None
        access = torch.compile(accesses, mode="max-autotune-no-cudagraphs") if peer == "max-autotune" else accesses
        originals = [layer.parametrizations.weight.original for layer in model]
        upstream = [torch.randn_like(t) for t in originals]
        with torch.no_grad():
            first = access(model.eval())[0]
        exact = first.double() if exact is None else exact
        worst = error(first, exact)
        model.train()
        facts = {"case": "spectral_norm BigGAN-128 D", "batch": 1, "dtype": "torch.float32", "peer": peer}

        def run(backward: bool, peer=peer, group=group, access=access, model=model, grad_args=(originals, upstream)):
            with torch.set_grad_enabled(backward), ops.use_impl(tier_of(peer)):
                if group is not None:
                    group.update()
                out = access(model)
                if backward:
                    torch.autograd.grad(out, *grad_args)

        for found in _passes(run, 3 * size, 7 * size, scratch):
            yield facts | found | {"error": worst, "correct": worst < 1e-4}


def _able() -> list[str]:
    return [tier for tier, reason in tiers().items() if reason is None]


def _passes(run: Callable[[bool], None], forward: int, both: int, scratch: torch.Tensor) -> Iterator[dict]:
    """The times of run(backward) without and with the backward pass, and the floors from the bytes that each moves."""
    for what, size in (("forward", forward), ("forward + backward", both)):
        ms = milliseconds(functools.partial(run, what != "forward"), scratch)
        yield {"what": what, "ms": ms, "floor_ms_h200": 1e3 * Work(size, 0).floor(H200, "16 bits")}
