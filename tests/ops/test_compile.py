"""The case table under opcheck and torch.compile."""

import pytest
import torch
from torch import Tensor

from tests.cases import SMALL, TESTED, OpCase
from tests.support.observe import by_id, differentiable, observe
from tests.support.tolerance import FLOAT32, OPCHECK

IMPLEMENTATIONS = ("reference", TESTED)


def recorded_calls(case: OpCase, dtype: torch.dtype, channels_last: bool):
    """The dispatcher calls that one forward and backward pass of a case makes to fastgen's ops."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastgen":
                calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with Record():
        case.call(differentiable(case.tensors(dtype, channels_last)), impl=TESTED).sum().backward()
    return calls


# Graphs with symbolic sizes take nine tenths of the time, so there is one per op and norm. test_compile has one with
# fixed sizes per case.
SYMBOLIC = list({(case.op, case.options.get("norm", "batch")): case for case in SMALL}.values())


@by_id(SMALL)
@pytest.mark.parametrize(
    "dtype, channels_last", ((torch.float32, False), (torch.bfloat16, True)), ids=("float32", "bfloat16-channels_last")
)
def test_opcheck(case, dtype, channels_last, fastgen_kernels):
    """Schema, fake kernel and autograd registration of each registered op, forward and backward, agree with what it
    does."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32 and case in SYMBOLIC:
        checks.append("test_aot_dispatch_dynamic")
    calls = recorded_calls(case, dtype, channels_last)
    assert calls
    for func, args in calls:
        given_statistics = {i for i, a in enumerate(func._schema.arguments) if a.name in ("mean", "var")}
        args = tuple(
            a.requires_grad_(i not in given_statistics) if isinstance(a, Tensor) else a for i, a in enumerate(args)
        )
        torch.library.opcheck(func, args, test_utils=checks, **OPCHECK)


@by_id(SMALL)
def test_compile(case, fastgen_kernels):
    """One graph, forward and backward, with the eager result."""
    tensors = case.tensors(torch.float32)
    upstream = torch.ones_like(case.call({name: t.clone() for name, t in tensors.items()}, impl="reference"))
    eager = observe(case, tensors, upstream, TESTED)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: case.call(t, impl=TESTED), fullgraph=True, backend="aot_eager")
    again = differentiable({name: t.clone() for name, t in case.tensors(torch.float32).items()})
    out = compiled(again)
    out.sum().backward()
    torch.testing.assert_close(out, eager["out"])
    for name, t in again.items():
        torch.testing.assert_close(
            t.grad if t.requires_grad else t, eager[f"grad of {name}" if t.requires_grad else name]
        )


@by_id([case for case in SMALL if case.name in ("batch", "dcgan-middle")])
def test_compile_with_inductor(case):
    """The default backend, with a dynamic batch size, in training."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: case.call(t, impl=TESTED).sin(), fullgraph=True, dynamic=True)
    for seed, samples in ((0, 3), (1, 5)):
        tensors = case.tensors(torch.float32, seed=seed)
        tensors["x"] = torch.randn(samples, *tensors["x"].shape[1:], generator=torch.Generator().manual_seed(seed))
        copies = [differentiable({name: t.clone() for name, t in tensors.items()}) for _ in range(2)]
        for call, t in zip((compiled, lambda t: case.call(t, impl="reference").sin()), copies, strict=True):
            call(t).sum().backward()
        for name in tensors:
            actual, expected = (t[name].grad if t[name].requires_grad else t[name] for t in copies)
            torch.testing.assert_close(actual, expected, **FLOAT32)
