"""Each op of the case table in training, float32, beside eager PyTorch and torch.compile, in both memory formats."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_mebibytes
from tests.cases import LARGE, OpCase
from tests.support.observe import differentiable
from tests.support.tolerance import error

PEERS = ("eager", "compile", "fastgen")
PASSES = {"forward": 1, "backward": 2, "forward + backward": 3}  # pass -> its work, in forward passes


def layer(case: OpCase, peer: str):
    """tensors -> output, by one peer."""
    call = functools.partial(case.call, impl="auto" if peer == "fastgen" else "reference")
    return torch.compile(call) if peer == "compile" else call


def gradients(call, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    out = call(tensors)
    leaves = [t for t in tensors.values() if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@functools.cache
def oracle(case: OpCase) -> tuple[Tensor, list[Tensor]]:
    """An incoming gradient that is zero near the activation's kink, and the output and gradients in float64."""
    tensors = {name: t.double() for name, t in case.tensors(torch.float32).items()}
    z = case.call({name: t.clone() for name, t in tensors.items()}, activation="identity", impl="reference")
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream *= z.abs() > 1e-5 * z.abs().amax()
    return upstream, gradients(functools.partial(case.call, impl="reference"), differentiable(tensors), upstream)


def passes(call, tensors: dict[str, Tensor], upstream: Tensor) -> dict[str, Callable[[], object]]:
    """The timed calls, by the names of PASSES."""
    leaves, out = [t for t in tensors.values() if t.requires_grad], call(tensors)
    return {
        "forward": torch.no_grad()(lambda: call(tensors)),
        "backward": lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
        "forward + backward": lambda: torch.autograd.grad(call(tensors), leaves, upstream),
    }


@pytest.mark.parametrize("case", [case for case in LARGE if case.flops()], ids=lambda case: case.id)
def test_training(case, measure):
    exact_upstream, exact = oracle(case)
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # a backward alone is timed by running it again and again
    calls: dict[str, dict[str, Callable]] = {what: {} for what in PASSES}
    facts: dict[str, dict[str, dict]] = {what: {} for what in PASSES}
    for peer, channels_last in itertools.product(PEERS, (False, True)):
        call, tensors = layer(case, peer), differentiable(case.tensors(torch.float32, channels_last))
        found = gradients(call, tensors, exact_upstream)
        names = ["out", *(name for name, t in tensors.items() if t.requires_grad)]
        worst = max(
            error(actual, expected)
            for name, actual, expected in zip(names, found, exact, strict=True)
            if name != "bias" or not case.batch_stats  # with batch statistics its gradient is zero up to rounding
        )
        column = f"{peer} {'channels_last' if channels_last else 'contiguous'}"
        for what, run in passes(call, tensors, torch.empty_like(found[0]).copy_(exact_upstream)).items():
            calls[what][column] = run
            facts[what][column] = {"error": worst, "correct": worst < 1e-5, "mebibytes": peak_mebibytes(run)}
    for what, times in PASSES.items():
        table, flops = f"{case.op}, training, {what}", case.flops() * times
        measure(calls[what], facts[what], table=table, row=case.name, flops=flops)
