"""Each op of the case table in training, float32, beside eager PyTorch and torch.compile, in both memory formats."""

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_mebibytes
from tests.cases import LARGE, OpCase
from tests.ops.test_cases import differentiable, error

PEERS = ("eager", "compile", "fastgen")
PASSES = {"forward": 1, "backward": 2, "forward + backward": 3}  # and their work, in forward passes


@functools.lru_cache(maxsize=1)
def layer(case: OpCase, peer: str, channels_last: bool):
    """tensors -> output, by one peer; what is compiled serves all the passes of one memory format."""
    torch._dynamo.reset()
    impl = "auto" if peer == "fastgen" else "reference"
    call = functools.partial(case.call, impl=impl)
    if peer != "compile":
        return call
    torch._functorch.config.donated_buffer = False  # a backward alone is timed by running it again and again
    return torch.compile(call)


def gradients(call, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    out = call(tensors)
    leaves = [t for t in tensors.values() if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@functools.cache
def oracle(case: OpCase) -> tuple[Tensor, list[Tensor]]:
    """An incoming gradient away from the activation's kink, and the float64 output and gradients under it."""
    tensors = {name: t.double() for name, t in case.tensors(torch.float32).items()}
    z = case.call({name: t.clone() for name, t in tensors.items()}, activation="identity", impl="reference")
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream *= z.abs() > 1e-5 * z.abs().amax()
    return upstream, gradients(functools.partial(case.call, impl="reference"), differentiable(tensors), upstream)


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [case for case in LARGE if case.flops()], ids=lambda case: case.id)
def test_training(case, what, peer, channels_last, measure):
    call = layer(case, peer, channels_last)
    upstream, exact = oracle(case)
    tensors = differentiable(case.tensors(torch.float32, channels_last))
    found = gradients(call, tensors, upstream)
    names = ["out", *(name for name, t in tensors.items() if t.requires_grad)]
    worst = max(
        error(mine, true)
        for name, mine, true in zip(names, found, exact, strict=True)
        if name != "bias" or not case.batch_stats  # then its gradient is zero, but for rounding
    )
    upstream = torch.empty_like(found[0]).copy_(upstream)
    leaves = [t for t in tensors.values() if t.requires_grad]

    if what == "forward":

        def run():
            with torch.no_grad():
                call(tensors)
    elif what == "backward":
        out = call(tensors)

        def run():
            torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    else:

        def run():
            torch.autograd.grad(call(tensors), leaves, upstream)

    measure(
        run,
        table=f"{case.op}, training, {what}",
        row=case.name,
        column=f"{peer} {'channels_last' if channels_last else 'contiguous'}",
        flops=case.flops() * PASSES[what],
        error=worst,
        correct=worst < 1e-5,
        mebibytes=peak_mebibytes(run),
    )
