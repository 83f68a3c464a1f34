"""The reparameterization sampler with its KL term beside eager PyTorch and torch.compile, float32."""

import functools

import pytest
import torch

from fastgen import ops
from tests.cases import SAMPLER_LARGE
from tests.support.tolerance import error


def eager(mu, logvar):
    std = torch.exp(0.5 * logvar)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    return mu + std * torch.randn_like(std), kl


def peer_call(peer):
    if peer == "compile":
        return torch.compile(eager)
    return eager if peer == "eager" else lambda mu, logvar: ops.reparameterize_kl(mu, logvar, impl="cpp")


@pytest.mark.parametrize("what", ("forward", "forward + backward"))
@pytest.mark.parametrize("case", SAMPLER_LARGE, ids=lambda case: case.id)
def test_sampler(case, what, measure):
    torch._dynamo.reset()
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32).values()]
    upstream = [torch.randn(tensors[0].shape), torch.randn(len(tensors[0]))]
    mu, logvar = (t.detach().double() for t in tensors)
    calls, facts = {}, {}
    for peer in ("eager", "compile", "fastgen"):
        call = peer_call(peer)
        z, kl = (t.detach() for t in call(*tensors))
        noise = (z - mu) / (logvar / 2).exp()
        worst = error(kl, eager(mu, logvar)[1])
        normal = abs(noise.mean()) < 5e-3 and abs(noise.var() - 1) < 1e-2
        calls[peer] = functools.partial(timed_call, call, tensors, upstream if "backward" in what else None)
        facts[peer] = {"error": worst, "correct": bool(normal) and worst < 1e-5}
    passes = (
        3 if what == "forward" else 8
    )  # reads mu and logvar, writes z; then those and z's gradient for two gradients
    measure(calls, facts, table=f"{case.op}, float32", row=f"{case.name}, {what}", bytes=passes * mu.numel() * 4)


def timed_call(call, tensors, upstream):
    with torch.set_grad_enabled(upstream is not None):
        out = call(*tensors)
    if upstream is not None:
        torch.autograd.grad(out, tensors, upstream)
