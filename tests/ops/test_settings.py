"""Settings are per thread, an op's outputs depend only on its inputs, and backward computes only the requested
gradients."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastgen
from fastgen import losses, ops
from fastgen.ops import _convolution, _policy, _spectral_convolution
from tests.cases import TESTED

X = torch.ones(2, 3, 8, 8)


def in_another_thread(call: Callable[[], object]) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def network() -> nn.Module:
    return fastgen.fuse(nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4)))


def lacks_gradients() -> bool:
    model = network()
    with ops.use_impl(TESTED):
        model(X).sum().backward()
    return any(parameter.grad is None for parameter in model.parameters())


def test_another_threads_backward_keeps_its_gradients():
    """Also within a gradient penalty that calls the discriminator between its passes."""
    found, model = [], network()

    def discriminator(images):
        logits = model(images).flatten(1).mean(1)
        logits.register_hook(lambda grad: found.append(in_another_thread(lacks_gradients)))
        return logits

    with ops.use_impl(TESTED):
        losses.gradient_penalty(discriminator, X, 1 - X)
    with ops.without_weight_grads():
        found.append(in_another_thread(lacks_gradients))
        assert lacks_gradients()
    assert found == [False, False]


def test_use_impl_does_not_affect_other_threads():
    def implementation() -> str:
        before = ops.implementations_used().get("norm_act", {}).get("reference", 0)
        ops.norm_act(X, norm="none")
        return "reference" if ops.implementations_used()["norm_act"].get("reference", 0) > before else "auto"

    with ops.use_impl("reference"):
        assert (implementation(), in_another_thread(implementation)) == ("reference", "auto")
        with ops.use_impl("auto"):
            assert implementation() == "auto"
        assert implementation() == "reference"
    assert implementation() == "auto"


def test_each_thread_records_its_own_questions():
    weight = torch.ones(4, 3, 3, 3)

    def ask(size: int) -> None:
        ops.conv2d_norm_act(torch.ones(1, 3, size, size), weight, norm="none")

    ask(9)  # memoized by now
    with _policy.recorded() as questions:
        ask(9)
        in_another_thread(lambda: ask(11))
        ask(10)
    assert {question.input for question in questions} == {(1, 3, 9, 9), (1, 3, 10, 10)}


NAMES = ("x", "weight", "bias")


@pytest.mark.parametrize("spectral", (False, True), ids=("plain", "spectral"))
@pytest.mark.parametrize("names", (("x",), ("weight",), ("bias",), ("x", "weight"), NAMES), ids="+".join)
def test_gradients_that_are_not_requested_are_not_computed(names, spectral, monkeypatch):
    """For torch.autograd.grad(inputs=) of leaves and of intermediate results, without any context manager."""
    seen = []
    gradients = _convolution.gradients
    for module in (_convolution, _spectral_convolution):
        monkeypatch.setattr(module, "gradients", lambda *inputs: seen.append(tuple(inputs[4])) or gradients(*inputs))
    for is_leaf in (True, False):
        tensors = {
            name: torch.randn(shape) for name, shape in zip(NAMES, ((2, 3, 8, 8), (4, 3, 3, 3), (4,)), strict=True)
        }
        tensors = {name: t.requires_grad_() if is_leaf else t.requires_grad_() * 1 for name, t in tensors.items()}
        if spectral:
            inputs = (tensors["x"], tensors["weight"], torch.tensor(2.0), tensors["bias"], "relu", 0.0)
            out = torch.ops.fastgen.spectral_convolution(*inputs, (1, 1), (0, 0), (), 1, (1, 1), False)
        else:
            out = ops.conv2d_norm_act(*tensors.values(), norm="none", activation="relu", impl=TESTED)
        found = torch.autograd.grad(out.sum(), [tensors[name] for name in names], retain_graph=True)
        everything = torch.autograd.grad(out.sum(), list(tensors.values()))
        for name, grad in zip(names, found, strict=True):
            torch.testing.assert_close(grad, everything[NAMES.index(name)])
        assert seen == [("x" in names, "weight" in names), (True, True)]
        seen.clear()


def drawn() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def everything(impl: str) -> list[torch.Tensor]:
    """Values, gradients and second gradients of the ops, and of the losses that draw or create tensors."""
    x, weight, real, fake = (
        torch.randn(shape, generator=drawn(), dtype=torch.float32, device="cpu").requires_grad_()
        for shape in ((2, 3, 8, 8), (4, 3, 3, 3), (4, 3, 8, 8), (4, 3, 8, 8))
    )
    u, v = (weight.new_ones(size) for size in (4, 27))
    z, kl = ops.reparameterize_kl(x, 0.1 * x, prior_mean=0.5, generator=drawn(), impl=impl)
    quotient, *rest = ops.spectral_norm(weight, u, v, impl=impl)
    found = [z, kl, quotient, *(t.detach() for t in rest)]
    found += torch.autograd.grad(z.sum() + kl.sum() + quotient.square().sum(), (x, weight))
    for options in ({"norm": "group", "num_groups": 2, "activation": "silu"}, {"training": True}):
        y = ops.conv2d_norm_act(x, weight, impl=impl, **options)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found += [y, first, *torch.autograd.grad(first.square().sum(), (x, weight))]

    def discriminator(images):
        return ops.conv2d_norm_act(images, weight, norm="none", activation="tanh", impl=impl).flatten(1).mean(1)

    found += [losses.gradient_penalty(discriminator, real, 1 - fake, generator=drawn())]
    found += [losses.r1_penalty(discriminator(real), real), losses.gaussian_nll(real, fake, 0.3)]
    return found


@pytest.mark.parametrize("impl", ("reference", TESTED))
def test_defaults_of_the_process_decide_nothing(impl):
    """A tensor created without dtype or device would be float64 or on "meta", and the results would differ."""
    expected = everything(impl)
    try:
        torch.set_default_dtype(torch.float64)
        in_float64 = everything(impl)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        on_meta = everything(impl)
    for other in (in_float64, on_meta):
        for expected_value, other_value in zip(expected, other, strict=True):
            assert other_value.dtype == expected_value.dtype and torch.equal(expected_value, other_value)
