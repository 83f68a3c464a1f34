"""torch.func over the ops, compiled too, and forward-mode derivatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from fastgen import ops
from tests.cases import TESTED
from tests.support.process import run_python
from tests.support.tolerance import FLOAT32

X, WEIGHT = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 3, 6, 6), (4, 3, 3, 3)))
U, V = torch.ones(4) / 2, torch.ones(27) / 27**0.5
FUNCTIONS = {
    "conv2d_norm_act": lambda w, impl: ops.conv2d_norm_act(X, w, norm="instance", activation="tanh", impl=impl),
    "norm_act": lambda w, impl: ops.norm_act(w, norm="group", num_groups=3, activation="silu", impl=impl),
    "spectral_norm": lambda w, impl: ops.spectral_norm(w, U, V, impl=impl)[0],
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dim", (0, -1))
def test_vmap(function, dim, requires_grad):
    """With and without gradients, nested, with any mapped dimension, and without PyTorch's warning about a slow
    fallback."""
    many = torch.stack([WEIGHT, 2 * WEIGHT, 1 - WEIGHT]).requires_grad_(requires_grad)
    expected = torch.stack([function(w, "reference") for w in many])
    torch.testing.assert_close(vmap(lambda w: function(w, TESTED), dim)(many.movedim(0, dim)), expected)
    torch.testing.assert_close(vmap(vmap(lambda w: function(w, TESTED)))(many[None])[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda w: function(w, TESTED))(many), expected)


def test_vmap_of_gradients(function):
    def loss(w, impl):
        return function(w, impl).pow(3).sum()

    many = torch.stack([WEIGHT, 2 * WEIGHT])
    for over in (lambda impl: vmap(grad(lambda w: loss(w, impl))),
                 lambda impl: grad(lambda m: vmap(lambda w: loss(w, impl))(m).sum()),
                 lambda impl: vmap(grad(lambda w: grad(lambda w: loss(w, impl))(w).square().sum()))):  # fmt: skip
        torch.testing.assert_close(over(TESTED)(many), over("reference")(many), **FLOAT32)


@pytest.mark.parametrize("transform", (grad, lambda f: vmap(grad(f))), ids=("grad", "vmap-grad"))
def test_compile(function, transform):
    """One graph, although torch.compile does not know whether a gradient is needed."""
    torch._dynamo.reset()
    at = WEIGHT if transform is grad else torch.stack([WEIGHT, 2 * WEIGHT])
    compiled = torch.compile(transform(lambda w: function(w, TESTED).pow(3).sum()), backend="aot_eager", fullgraph=True)
    expected = transform(lambda w: function(w, "reference").pow(3).sum())(at)
    torch.testing.assert_close(compiled(at), expected, **FLOAT32)


def test_forward_derivatives(function):
    """Auto uses PyTorch for them; an implementation without them raises an error, and no derivative is silently
    lost."""
    tangent = torch.ones_like(WEIGHT)
    expected = jvp(lambda w: function(w, "reference"), (WEIGHT,), (tangent,))
    torch.testing.assert_close(jvp(lambda w: function(w, "auto"), (WEIGHT,), (tangent,)), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(WEIGHT, tangent)
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(function(dual, "auto"))), expected)
        assert torch.equal(function(WEIGHT, TESTED), function(WEIGHT.clone(), TESTED))
        with pytest.raises(NotImplementedError, match="no forward derivatives: use impl='reference'"):
            function(dual, TESTED)
    for transform in (torch.func.jacfwd, torch.func.hessian, lambda f: torch.func.linearize(f, WEIGHT)[1]):
        with pytest.raises(NotImplementedError, match="no forward derivatives"):
            transform(lambda w: function(w, TESTED).pow(2).sum())(WEIGHT)


TRACED = """
import torch
from torch import nn
import fastgen
from tests.support.tolerance import FLOAT32
layers = (nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3), nn.Tanh())
model = nn.Sequential(*layers).eval()
x, other = torch.randn(2, 16, 8, 8), torch.randn(5, 16, 8, 8)
traced = torch.jit.trace(fastgen.fuse(model), x)  # the first call in this process: the processor is not known yet
torch.testing.assert_close(traced(other), model(other), **FLOAT32)
"""


def test_jit_trace_is_the_first_call():
    run_python(TRACED, flags=("-W", "ignore"))
