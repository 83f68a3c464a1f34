"""The reparameterization sampler with its KL term beside eager PyTorch and torch.compile, float32."""

import pytest
import torch

from fastgen import ops
from tests.cases import SAMPLER_LARGE
from tests.ops.test_cases import error


def eager(mu, logvar):
    std = torch.exp(0.5 * logvar)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    return mu + std * torch.randn_like(std), kl


def peer_call(peer):
    torch._dynamo.reset()
    if peer == "compile":
        return torch.compile(eager)
    return eager if peer == "eager" else lambda mu, logvar: ops.reparameterize_kl(mu, logvar, impl="cpp")


@pytest.mark.parametrize("peer", ("eager", "compile", "fastgen"))
@pytest.mark.parametrize("what", ("forward", "forward + backward"))
@pytest.mark.parametrize("case", SAMPLER_LARGE, ids=lambda case: case.id)
def test_sampler(case, what, peer, measure):
    call, tensors = peer_call(peer), [t.requires_grad_() for t in case.tensors(torch.float32).values()]
    upstream = [torch.randn(tensors[0].shape), torch.randn(len(tensors[0]))]

    def run():
        if what == "forward":
            with torch.no_grad():
                return call(*tensors)
        out = call(*tensors)
        torch.autograd.grad(out, tensors, upstream)
        return out

    z, kl = (t.detach() for t in run())
    mu, logvar = (t.detach().double() for t in tensors)
    noise = (z - mu) / (logvar / 2).exp()
    worst = error(kl, eager(mu, logvar)[1])
    normal = abs(noise.mean()) < 5e-3 and abs(noise.var() - 1) < 1e-2
    facts = {"flops": 0, "error": worst, "correct": bool(normal) and worst < 1e-5}
    measure(run, table=f"{case.op}, float32", row=f"{case.name}, {what}", column=peer, **facts)
