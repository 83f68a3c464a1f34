"""Properties of every op, tested on each case of the case table."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen.ops import _policy
from fastgen.ops._activations import activate
from fastgen.ops._question import Choice
from tests.cases import CASES, LARGE, SAMPLER, SMALL, SPECTRAL, TESTED, OpCase
from tests.support.observe import by_id, differentiable, observe
from tests.support.tolerance import FLOAT64, UNIT_ROUNDOFF, error, units

IMPLEMENTATIONS = ("reference", TESTED)


def check_parity(case: OpCase, dtype: torch.dtype, channels_last: bool, winograd: bool = False) -> None:
    """At most `factor` times the error of PyTorch's own ops against float64, forward and backward."""
    tensors = case.tensors(dtype, channels_last)
    exact_inputs = {name: t.double() for name, t in tensors.items()}
    # A band around the activation's kink: rounding can move a value to its other side, where the slope differs.
    z = case.call({name: t.clone() for name, t in exact_inputs.items()}, activation="identity", impl="reference")
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream *= z.abs() > (64 if winograd else 16) * UNIT_ROUNDOFF[dtype] * z.abs().amax()
    exact = observe(case, exact_inputs, upstream, "reference")
    reference = observe(case, tensors, upstream, "reference")
    actual = observe(case, tensors, upstream, TESTED)
    for name in exact:
        if name == "grad of bias" and case.batch_stats:
            continue  # mathematically zero: all three results are only rounding
        assert actual[name].dtype == reference[name].dtype
        allowed = case.allowed(error(reference[name], exact[name]), dtype, name, winograd)
        assert error(actual[name], exact[name]) <= allowed, name
    if z.dim() == 4 and channels_last and not z.is_contiguous():
        assert actual["out"].is_contiguous(memory_format=torch.channels_last)
        assert reference["out"].is_contiguous(memory_format=torch.channels_last)


@by_id(SMALL)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_parity(case, dtype, channels_last, poisoned, fastgen_kernels):
    check_parity(case, dtype, channels_last)


@by_id(LARGE)
@pytest.mark.parametrize("winograd", (False, True), ids=("direct", "winograd"))
def test_parity_of_real_layers(case, winograd, poisoned, fastgen_kernels, monkeypatch):
    """With at most eight images, because the reference is slow."""
    monkeypatch.setenv("FASTGEN_WINOGRAD", "always" if winograd else "0")
    x = case.shapes["x"]
    few = dataclasses.replace(case, shapes=case.shapes | {"x": (min(8, x[0]), *x[1:])})
    check_parity(few, torch.float32, True, winograd)


@by_id([case for case in SMALL if case.op.startswith("conv")])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_parity_of_winograd(case, dtype, poisoned, fastgen_kernels, monkeypatch):
    """Odd sizes, few channels and all kinds of padding, where auto does not choose the algorithm."""
    monkeypatch.setenv("FASTGEN_WINOGRAD", "always")
    check_parity(case, dtype, True, winograd=True)


@by_id(SMALL)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(case, impl, fastgen_kernels):
    """First and second derivatives against finite differences, in float64."""
    tensors = differentiable(case.tensors(torch.float64))
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}

    def call(*values):
        state = {name: t.clone() for name, t in tensors.items() if name not in leaves}
        return case.call(dict(zip(leaves, values, strict=True)) | state, impl=impl)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


@by_id([case for case in SMALL if case.op.startswith("conv")])
@pytest.mark.parametrize("grads", ("torch", "cpp"))
def test_unfused(case, grads, monkeypatch):
    """PyTorch's convolution, then fastgen's norm and activation: what auto runs where fastgen's convolution is
    slower."""
    monkeypatch.setattr(_policy, "_fastest", lambda what, *_: Choice("torch" if what == "forward" else grads))
    tensors = case.tensors(torch.float64)
    upstream = torch.randn_like(case.call({name: t.clone() for name, t in tensors.items()}, impl="reference"))
    before = ops.implementations_used().get(case.op, {}).get("unfused", 0)
    found = [observe(case, tensors, upstream, impl) for impl in ("auto", "reference")]
    torch.testing.assert_close(*found, **FLOAT64)
    assert ops.implementations_used()[case.op]["unfused"] == before + 1


@by_id(SMALL)
def test_meta(case):
    """Meta tensors give the right sizes."""
    tensors = case.tensors(torch.float32)
    out = case.call({name: t.to("meta") for name, t in tensors.items()})
    assert out.device.type == "meta" and out.shape == case.call(tensors).shape


def kept_for_backward(call, tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The call's output, and the number of values that it saves for backward in addition to its inputs."""
    inputs, sizes = {t.untyped_storage().data_ptr() for t in tensors.values()}, []

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in inputs:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return call(tensors), sum(sizes)


@by_id([case for case in SMALL if case.op.startswith("conv")])
@pytest.mark.parametrize("impl", ("auto", *IMPLEMENTATIONS))
def test_memory_efficient(case, impl):
    """The same bits, running statistics included, and only the inputs are saved."""
    found, kept = [], []
    for memory_efficient in (False, True):
        tensors = differentiable(case.tensors(torch.float32))
        leaves = [t for t in tensors.values() if t.requires_grad]
        call = functools.partial(case.call, impl=impl, memory_efficient=memory_efficient)
        out, count = kept_for_backward(call, tensors)
        kept.append(count)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaves, allow_unused=True)
        found.append([out, *first, *second, *(t for t in tensors.values() if not t.requires_grad)])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    if impl != "reference" and case.options.get("norm") != "none":
        assert kept[1] == 0 < kept[0]


def test_without_weight_grads():
    """Only the input's gradient is computed, and a penalty on it still reaches the weights."""
    found = []
    for impl in IMPLEMENTATIONS:
        x, weight = (torch.randn(s, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
                     for s in ((2, 3, 5, 5), (4, 3, 3, 3)))  # fmt: skip
        with ops.without_weight_grads():
            out = ops.conv2d_norm_act(x, weight, norm="instance", activation="tanh", impl=impl).sum()
            (grad,) = torch.autograd.grad(out, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(*found)
    with ops.without_weight_grads():
        out = ops.conv2d_norm_act(x, weight, norm="instance", activation="relu", impl=TESTED).sum()
        assert torch.autograd.grad(out, weight, allow_unused=True) == (None,)


def elementary(case: OpCase, tensors: dict[str, Tensor]) -> Tensor:
    """The op from elementary operations, with correct derivatives of any order (PyTorch's batch_norm has them up to the
    second)."""
    options = {"norm": "batch", "activation": "leaky_relu", "negative_slope": 0.01, "eps": 1e-5} | case.options
    x = tensors["x"]
    if "weight" in tensors:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        geometry = {k: v for k, v in options.items() if k in names}
        if options.get("padding_mode") == "reflect":
            x = F.pad(x, [geometry.pop("padding")] * 4, mode="reflect")
        convolution = F.conv_transpose2d if "transpose" in case.op else F.conv2d
        x = convolution(x, tensors["weight"], tensors.get("bias"), **geometry)
    shape = (-1, *(1,) * (x.dim() - 2))
    if options["norm"] != "none":
        if case.batch_stats:
            over = [d for d in range(x.dim()) if d > 1 or (d == 0 and options["norm"] == "batch")]
            if options["norm"] == "group":
                grouped = x.unflatten(1, (options["num_groups"], -1))
                var, mean = torch.var_mean(grouped, list(range(2, grouped.dim())), correction=0, keepdim=True)
                mean, var = (t.expand_as(grouped).flatten(1, 2) for t in (mean, var))
            else:
                var, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        else:
            mean, var = tensors["running_mean"].view(shape), tensors["running_var"].view(shape)
        x = (x - mean) / (var + options["eps"]).sqrt()
    if "norm_weight" in tensors:
        x = x * tensors["norm_weight"].view(shape) + tensors["norm_bias"].view(shape)
    x = x + tensors["residual"] if "residual" in tensors else x
    return activate(x, options["activation"], options["negative_slope"])


@by_id(SMALL)
def test_third_derivative(case, fastgen_kernels):
    """Third derivatives: the gradient of a gradient penalty's gradient."""
    if "output_padding" in case.options:
        pytest.skip("PyTorch has no third derivative of a transposed convolution with output_padding")
    found = []
    for call in (lambda t: case.call(t, impl=TESTED), lambda t: elementary(case, t)):
        tensors = differentiable(case.tensors(torch.float64))
        leaves = [t for t in tensors.values() if t.requires_grad]
        value = call(tensors).pow(3).mean()
        for _ in range(3):
            grads = [
                g for g in torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True) if g is not None
            ]
            value = sum(g.pow(2).mean() for g in grads)
        found.append(value)
    torch.testing.assert_close(*found, **FLOAT64)


@by_id(SMALL)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(case, impl):
    """Strided, expanded and transposed inputs and incoming gradients give the same results as contiguous ones."""
    plain = case.tensors(torch.float64)
    expected_upstream = torch.randn_like(case.call({n: t.clone() for n, t in plain.items()}, impl="reference"))
    expected = observe(case, plain, expected_upstream, "reference")
    strided = {}
    for name, t in plain.items():
        wide = torch.zeros(*(2 * size + 1 for size in t.shape), dtype=t.dtype)
        strided[name] = wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    tensors = differentiable({n: t if n.startswith("running") else t.detach() for n, t in strided.items()})
    out = case.call(tensors, impl=impl)
    upstream = expected_upstream.transpose(0, -1).contiguous().transpose(0, -1)
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    torch.testing.assert_close(out, expected["out"])
    for name, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True):
        torch.testing.assert_close(grad, expected[f"grad of {name}"], **FLOAT64)


@by_id(SMALL)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_expanded(case, impl):
    """Stride 0 in the input and in the incoming gradient (sum() makes one)."""
    tensors = case.tensors(torch.float64)
    tensors["x"] = tensors["x"][:, :1].expand(tensors["x"].shape)
    results = [case.call({n: t.clone() for n, t in tensors.items() if n != "x"} | {"x": tensors["x"]}, impl=i)
               for i in ("reference", impl)]  # fmt: skip
    torch.testing.assert_close(*results)
    if case.options.get("norm") != "instance":
        found = [
            observe(case, case.tensors(torch.float64), torch.ones(()).expand_as(results[0]), i)
            for i in ("reference", impl)
        ]
        torch.testing.assert_close(*found, **FLOAT64)


@by_id([case for case in SMALL if case.options.get("norm") in ("instance", "group") or not case.batch_stats])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_batch(case, impl):
    tensors = case.tensors(torch.float32)
    tensors = differentiable({name: t[:0] if name in ("x", "residual") else t for name, t in tensors.items()})
    out = case.call(tensors, impl=impl)
    assert out.shape[0] == 0 and out.numel() == 0
    out.sum().backward()
    assert tensors["x"].grad.shape == tensors["x"].shape
    for name in ("weight", "norm_weight"):
        if name in tensors:
            assert not tensors[name].grad.any()


AUTOCAST = units(torch.bfloat16, 8, 8)  # PyTorch rounds the convolution before a norm that may divide by less than 1


@by_id([case for case in SMALL if case.op.startswith("conv")])
def test_autocast(case):
    """x, weight and bias are cast to autocast's dtype, the norm's parameters are not; each gradient has its leaf's
    dtype."""
    found = []
    for impl in IMPLEMENTATIONS:
        tensors = differentiable(case.tensors(torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case.call(tensors, impl=impl)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in tensors.values() if t.requires_grad)
        found.append(out)
    torch.testing.assert_close(*found, **AUTOCAST)


@by_id([case for case in SMALL if case.options.get("training")])
def test_thread_count_does_not_matter(case):
    seen = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tensors = case.tensors(torch.float32)
            seen.append(
                (case.call(tensors, impl=TESTED), tensors["x"], *(t for n, t in tensors.items() if "running" in n))
            )
    finally:
        torch.set_num_threads(threads)
    for first, second in itertools.pairwise(seen):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_transforms(impl):
    """torch.func differentiates the ops, also twice, and maps over them."""
    x, weight = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(3, 4, 4, 4, dtype=torch.float64)
    mu, logvar = torch.randn(2, 4, 5, dtype=torch.float64)
    u, v = torch.ones(3).double(), torch.ones(64).double()

    def convolution(weight):
        return (
            ops.conv_transpose2d_norm_act(
                x, weight, stride=2, norm="batch", activation="leaky_relu", training=True, impl=impl
            )
            .pow(3)
            .sum()
        )

    def sampler(mu):
        z, kl = ops.reparameterize_kl(mu, logvar, generator=torch.Generator().manual_seed(0), impl=impl)
        return z.pow(3).sum() + kl.square().sum()

    def spectral(weight):
        return ops.spectral_norm(weight, u, v, impl=impl)[0].pow(3).sum()

    for function, at in ((convolution, weight), (sampler, mu), (spectral, weight)):
        leaf = at.clone().requires_grad_()
        first = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), leaf)[0]
        torch.testing.assert_close(torch.func.grad(function)(at), first.detach())
        found = torch.func.grad(lambda at, function=function: torch.func.grad(function)(at).square().sum())(at)
        torch.testing.assert_close(found, second)
        torch.testing.assert_close(torch.func.vjp(function, at)[1](torch.ones_like(function(at)))[0], first.detach())
    each = torch.func.vmap(torch.func.grad(convolution))(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(each[1], torch.func.grad(convolution)(2 * weight))


def test_table_is_complete():
    others = {
        "implementations_used",
        "info",
        "use_impl",
        "without_weight_grads",
        "reparameterize",
        "spectral_norm_group",
    }
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert {case.op for case in CASES + SAMPLER + SPECTRAL} == functions - others
