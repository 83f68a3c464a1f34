"""Spectral norm: parity and gradients, sigma itself, degenerate weights, groups."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastgen import ops
from tests.cases import SPECTRAL, TESTED
from tests.support.observe import by_id, observe
from tests.support.process import run_python
from tests.support.tolerance import FLOAT32, FLOAT64, OPCHECK, UNIT_ROUNDOFF, error, units

IMPLEMENTATIONS = ("reference", TESTED)
SHORT = [case for case in SPECTRAL if case.shapes["v"][0] < 1000]


def inputs(case, dtype, channels_last=False):
    """The weight and unit vectors; in eval after ten iterations, since sigma of random vectors is nearly zero."""
    tensors = case.tensors(dtype, channels_last)
    tensors |= {name: F.normalize(tensors[name], dim=0) for name in ("u", "v")}
    if not case.options.get("training", True):
        *_, u, v = ops.spectral_norm(
            *tensors.values(), dim=case.options["dim"], n_power_iterations=10, impl="reference"
        )
        tensors |= {"u": u, "v": v}
    return tensors


def check_parity(case, dtype, channels_last):
    """At most twice the reference's error in the same precision."""
    tensors = inputs(case, dtype, channels_last)
    exact = observe(case, {name: t.double() for name, t in tensors.items()}, None, "reference")
    reference, actual = (observe(case, tensors, None, impl) for impl in IMPLEMENTATIONS)
    for name in exact:
        assert actual[name].dtype == reference[name].dtype
        assert error(actual[name], exact[name]) <= case.allowed(error(reference[name], exact[name]), dtype, name), name
    for name in ("out", "grad of weight"):
        assert actual[name].stride() == tensors["weight"].stride()
    quotient, *others = ops.spectral_norm(*tensors.values(), **case.options, divide=False, impl=TESTED)
    assert quotient.numel() == 0
    assert all(torch.equal(actual[name], other) for name, other in zip(("sigma", "u", "v"), others, strict=True))


@by_id(SPECTRAL)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_parity(case, dtype, channels_last, poisoned):
    check_parity(case, dtype, channels_last)


@by_id(SHORT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(case, impl):
    """First and second derivatives at fixed u and v against finite differences, in float64."""
    tensors = inputs(case, torch.float64)
    *_, u, v = case.call(tensors, impl="reference")

    def call(weight):
        options = case.options | {"training": False}
        return ops.spectral_norm(weight, u, v, **options, impl=impl)[:2]

    weight = tensors["weight"].requires_grad_()
    assert torch.autograd.gradcheck(call, weight, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, weight, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sigma_alone(impl):
    """Without weight / sigma, sigma's gradient is u v^T."""
    weight, u, v = torch.randn(6, 5, 3, 3, requires_grad=True), torch.randn(6), torch.randn(45)
    quotients, sigmas, us, vs = ops.spectral_norm_group([weight], [u], [v], divide=False, impl=impl)
    (grad,) = torch.autograd.grad(sigmas, weight)
    torch.testing.assert_close(grad, torch.outer(us[0], vs[0]).view_as(weight))
    assert quotients[0].shape == (0,) and quotients[0].dtype == weight.dtype
    torch.library.opcheck(torch.ops.fastgen.spectral_norm.default, ([weight], [u], [v], [0], 1, 1e-12, False, False))


@by_id(SHORT)
def test_third_derivative(case):
    found = []
    for impl in IMPLEMENTATIONS:
        tensors = inputs(case, torch.float64)
        weight = tensors["weight"].requires_grad_()
        out, sigma, *_ = case.call(tensors, impl=impl)
        value = out.pow(3).mean() + sigma
        for _ in range(3):
            value = torch.autograd.grad(value, weight, create_graph=True)[0].pow(2).mean()
        found.append(value)
    torch.testing.assert_close(*found, **FLOAT64)


@by_id(SHORT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_opcheck(case, dtype):
    tensors = inputs(case, dtype)
    weight = tensors["weight"].requires_grad_()
    arguments = (
        [weight],
        [tensors["u"]],
        [tensors["v"]],
        [case.options["dim"]],
        1,
        1e-12,
        case.options.get("v_first", False),
        True,
    )
    torch.library.opcheck(torch.ops.fastgen.spectral_norm.default, arguments, **OPCHECK)
    out, sigma, u, v = (t.detach() for t in case.call(tensors, impl=TESTED))
    grads = ([torch.randn_like(out).requires_grad_()], [torch.randn_like(sigma).requires_grad_()])
    arguments = (*grads, [weight], [sigma], [u], [v], [case.options["dim"]])
    torch.library.opcheck(torch.ops.fastgen.spectral_norm_backward.default, arguments, **OPCHECK)


@by_id(SHORT)
def test_compile(case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: case.call(t, impl=TESTED), fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, lambda t: case.call(t, impl=TESTED)):
        tensors = inputs(case, torch.float32)
        weight = tensors["weight"].requires_grad_()
        out, sigma, u, v = call(tensors)
        (out.square().sum() + sigma).backward()
        found.append((out, sigma, u, v, weight.grad))
    torch.testing.assert_close(*found)


def test_compile_with_inductor():
    torch._dynamo.reset()
    weight, u, v = (t.requires_grad_(t.dim() > 1) for t in inputs(SPECTRAL[0], torch.float32).values())
    call = torch.compile(lambda w: ops.spectral_norm(w, u, v, impl=TESTED)[0].sin(), fullgraph=True)
    found = [torch.autograd.grad(f(weight).sum(), weight)[0]
             for f in (call, lambda w: ops.spectral_norm(w, u, v, impl="reference")[0].sin())]  # fmt: skip
    torch.testing.assert_close(*found)


@by_id(SHORT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(case, impl):
    """Strided weights, vectors and incoming gradients give the same results as contiguous ones."""
    plain = inputs(case, torch.float64)
    strided = {}
    for name, t in plain.items():
        wide = torch.zeros(*(2 * size + 1 for size in t.shape), dtype=t.dtype)
        strided[name] = wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    results = []
    for tensors, i in ((plain, "reference"), (strided, impl)):
        weight = tensors["weight"].detach().requires_grad_()
        out, sigma, u, v = case.call(tensors | {"weight": weight}, impl=i)
        upstream = plain["weight"].transpose(0, -1).contiguous().transpose(0, -1)
        results.append((out, sigma, u, v, *torch.autograd.grad(out, weight, upstream)))
    torch.testing.assert_close(*results)
    torch.autograd.grad(case.call(strided | {"weight": weight}, impl=impl)[0].sum(), weight)  # a gradient of stride 0


CONVERGED = units(torch.float32, 256, 0)  # after 2000 iterations only rounding is left, also in the SVD's sigma


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("v_first", (False, True))
@pytest.mark.parametrize("shape", ((20, 30), (64, 3, 4, 4), (500, 2), (1, 9), (5, 4)))
def test_sigma_is_the_largest_singular_value(shape, v_first, impl):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 1) @ torch.randn(1, 4) if shape == (5, 4) else weight  # rank 1
    u, v = torch.ones(shape[0]), torch.ones(weight[0].numel())
    out, sigma, u, v = ops.spectral_norm(weight, u, v, n_power_iterations=2000, v_first=v_first, impl=impl)
    exact = torch.linalg.svdvals(weight.flatten(1).double())[0]
    torch.testing.assert_close(sigma.double(), exact, **CONVERGED)
    torch.testing.assert_close(torch.linalg.svdvals(out.flatten(1))[0], torch.tensor(1.0), **CONVERGED)
    assert abs(u.norm() - 1) < 1e-5 and abs(v.norm() - 1) < 1e-5


@pytest.mark.parametrize("value", (0.0, torch.inf, -torch.inf, torch.nan, 1e-8, 1e15))
@pytest.mark.parametrize("everywhere", (False, True))
def test_degenerate_weights(value, everywhere):
    """Zero, tiny, huge and non-finite weights give PyTorch's results."""
    linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 3))
    norm = linear.parametrizations.weight[0]
    weight = torch.full((3, 4), value) if everywhere else torch.randn(3, 4)
    weight[1, 2] = value
    for training in (True, False):
        norm.train(training)
        u, v = norm._u.clone(), norm._v.clone()
        expected = norm(weight)
        for impl in IMPLEMENTATIONS:
            out, _, new_u, new_v = ops.spectral_norm(weight, u, v, training=training, impl=impl)
            torch.testing.assert_close((out, new_u, new_v), (expected, norm._u, norm._v), equal_nan=True)
        norm._u, norm._v = F.normalize(torch.ones(3), dim=0), F.normalize(torch.ones(4), dim=0)


def test_group_is_the_single_op_for_each():
    """One call with mixed shapes, dtypes and dimensions gives the same bits and gradients as one call per weight, with
    any thread count."""
    cases = [case for case in SPECTRAL if set(case.options) == {"dim"}]
    tensors = [inputs(case, dtype) for case in cases for dtype in UNIT_ROUNDOFF]
    dims = [case.options["dim"] for case in cases for _ in UNIT_ROUNDOFF]
    seen, threads = [], torch.get_num_threads()
    try:
        for count, grouped in ((1, False), (1, True), (2, True), (3, True)):
            torch.set_num_threads(count)
            weights, us, vs = ([t[name].detach().requires_grad_() for t in tensors] for name in ("weight", "u", "v"))
            if grouped:
                outs, sigmas, us, vs = ops.spectral_norm_group(weights, us, vs, dims=dims, impl=TESTED)
            else:
                single = (
                    ops.spectral_norm(*t, dim=dim, impl=TESTED) for *t, dim in zip(weights, us, vs, dims, strict=True)
                )
                outs, sigmas, us, vs = (list(of) for of in zip(*single, strict=True))
            loss = sum(out.double().square().sum() + sigma for out, sigma in zip(outs, sigmas, strict=True))
            seen.append((*outs, *sigmas, *us, *vs, *torch.autograd.grad(loss, weights)))
    finally:
        torch.set_num_threads(threads)
    for first, second in itertools.pairwise(seen):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert ops.spectral_norm_group([], [], []) == ([], [], [], [])


@pytest.mark.skipif(TESTED != "cpp", reason="what the C++ kernels write past the caches")
@pytest.mark.parametrize("shape", ((1500, 1501), (33, 257, 16, 17), (257, 33, 16, 17)))
@pytest.mark.parametrize("dim", (0, 1))
def test_weights_that_leave_the_caches(shape, dim):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    u = F.normalize(torch.ones(shape[dim]), dim=0)
    v = F.normalize(torch.ones(weight.numel() // shape[dim]), dim=0)
    results = {}
    for impl in IMPLEMENTATIONS:
        out, sigma, *_ = ops.spectral_norm(weight, u, v, dim=dim, impl=impl)
        results[impl] = out, *torch.autograd.grad((out, sigma), weight, (weight.detach().sin(), torch.ones_like(sigma)))
    for actual, expected in zip(results["cpp"], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected, **FLOAT32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_are_not_modified(impl):
    """u and v are new tensors, in eval too, so writing to the inputs afterwards spoils no backward pass."""
    for training in (True, False):
        weight, u, v = (t.clone() for t in inputs(SPECTRAL[0], torch.float64).values())
        weight.requires_grad_()
        before = u.clone(), v.clone()
        out, _, new_u, new_v = ops.spectral_norm(weight, u, v, training=training, impl=impl)
        assert torch.equal(u, before[0]) and torch.equal(v, before[1])
        assert new_u.data_ptr() != u.data_ptr() and new_v.data_ptr() != v.data_ptr()
        u.zero_(), v.zero_()
        out.sum().backward()
        assert weight.grad.isfinite().all()


def test_errors():
    weight, u, v = torch.randn(3, 4), torch.ones(3), torch.ones(4)
    for match, call in (
        (r"u must have shape \(3,\)", lambda: ops.spectral_norm(weight, v, v)),
        (r"v must have shape \(4,\)", lambda: ops.spectral_norm(weight, u, u)),
        ("dim must be", lambda: ops.spectral_norm(weight, u, v, dim=2)),
        ("at least 2 dim", lambda: ops.spectral_norm(u, u, v)),
        ("n_power_iterations must be", lambda: ops.spectral_norm(weight, u, v, n_power_iterations=0)),
        ("must have the same length", lambda: ops.spectral_norm_group([weight], [u], [])),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="weight must be float32"):
        ops.spectral_norm(weight.long(), u, v)
    for name, vectors in (("u", (u.double(), v)), ("v", (u, v.bfloat16()))):
        for impl in IMPLEMENTATIONS:
            with pytest.raises(TypeError, match=f"{name} is .*, weight is torch.float32: convert {name}"):
                ops.spectral_norm(weight, *vectors, impl=impl)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_other_instruction_sets(isa):
    code = """
from tests.ops.test_spectral_norm import SPECTRAL, UNIT_ROUNDOFF, check_parity
for case in SPECTRAL:
    for dtype in UNIT_ROUNDOFF:
        check_parity(case, dtype, False)
"""
    run_python(code, environment={"FASTGEN_CPU_ISA": isa})


def test_default_kernels(tmp_path):
    """Without the native library the registered ops run in plain PyTorch and give the reference's results."""
    code = """
import torch
from fastgen.ops import _dispatch
from tests.ops.test_spectral_norm import SPECTRAL, inputs, observe
for case in SPECTRAL:
    tensors = inputs(case, torch.float64)
    expected = observe(case, tensors, None, "reference")
    choose, _dispatch._choose = _dispatch._choose, lambda *_: "cpp"
    found = observe(case, tensors, None, "cpp")
    _dispatch._choose = choose
    torch.testing.assert_close(found, expected)
"""
    run_python(code, environment={"FASTGEN_BUILD": "0", "FASTGEN_CACHE_DIR": str(tmp_path)})
