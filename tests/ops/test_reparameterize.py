"""The sampler: keys, gradients, extreme values."""

import itertools
import math
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastgen import ops
from fastgen.ops.reparameterize import reference_normal
from tests.cases import SAMPLER, TESTED
from tests.support.observe import by_id, observe, random_like
from tests.support.process import run_python
from tests.support.tolerance import FLOAT64, OPCHECK, UNIT_ROUNDOFF, error, units

IMPLEMENTATIONS = ("reference", TESTED)
SHORT = [case for case in SAMPLER if case.name != "long-rows"]


def sample(case, tensors, impl=TESTED, seed=0):
    """z and kl with the noise of this seed."""
    torch.manual_seed(seed)
    return case.call(tensors, impl=impl)


def check_parity(case, dtype):
    """At most twice the reference's error in the same precision, against float64 with the same float32 noise."""
    tensors = case.tensors(dtype)
    tensors["logvar"] = tensors["logvar"].clamp(-2, 2)
    reference, actual = (observe(case, tensors, None, impl) for impl in IMPLEMENTATIONS)
    doubles = {name: t.double() for name, t in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        if dtype != torch.float64:
            module = sys.modules["fastgen.ops.reparameterize"]
            patch.setattr(
                module, "reference_normal", lambda key, size, dtype: reference_normal(key, size, torch.float32).double()
            )
        exact = observe(case, doubles, None, "reference")
    for name in exact:
        assert actual[name].dtype == reference[name].dtype
        assert error(actual[name], exact[name]) <= case.allowed(error(reference[name], exact[name]), dtype, name), name


@by_id(SAMPLER)
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_parity(case, dtype, poisoned):
    check_parity(case, dtype)


@by_id(SHORT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(case, impl):
    """First and second derivatives against finite differences, in float64."""
    tensors = {name: t.requires_grad_() for name, t in case.tensors(torch.float64).items()}

    def call(*values):
        return sample(case, dict(zip(tensors, values, strict=True)), impl)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()), fast_mode=True)


@by_id(SHORT)
def test_third_derivative(case):
    found = []
    for impl in IMPLEMENTATIONS:
        tensors = [t.requires_grad_() for t in case.tensors(torch.float64).values()]
        z, kl = sample(case, dict(zip(case.shapes, tensors, strict=True)), impl)
        value = z.pow(3).mean() + kl.pow(2).mean()
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
            value = sum(g.pow(2).mean() for g in grads if g is not None)
        found.append(value)
    torch.testing.assert_close(*found, **FLOAT64)


@by_id(SHORT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_opcheck(case, dtype):
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastgen":
                calls.append((func, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with Record():
        observe(case, case.tensors(dtype), None, TESTED)
    assert len(calls) == 2
    for func, args in calls:
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        torch.library.opcheck(func, args, **OPCHECK)
    torch.library.opcheck(torch.ops.fastgen.philox_normal.default, (torch.tensor([1, 2]), [3, 5], torch.float32))


@by_id(SHORT)
def test_compile(case):
    """One graph, forward and backward; the same noise as the eager call for the same seed, and new noise at the next
    call."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: case.call(t, impl=TESTED), fullgraph=True, backend="aot_eager")
    eager = observe(case, case.tensors(torch.float32), None, TESTED)
    tensors = {name: t.requires_grad_() for name, t in case.tensors(torch.float32).items()}
    torch.manual_seed(0)
    z, kl = compiled(tensors)
    torch.autograd.backward((z, kl), [random_like(z), random_like(kl)])
    torch.testing.assert_close(z, eager["z"])
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad, eager[f"grad of {name}"])
    assert not torch.equal(compiled(tensors)[0], z)


def test_compile_with_inductor():
    """The default backend with a dynamic batch: each call has its own key, and backward uses the forward's noise."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, s: ops.reparameterize(m, s, impl=TESTED), fullgraph=True, dynamic=True)
    for samples in (3, 5):
        mu, logvar = torch.zeros(samples, 40), torch.zeros(samples, 40, requires_grad=True)
        z, again = compiled(mu, logvar), compiled(mu, logvar)
        assert not torch.equal(z, again)
        z.sum().backward()
        torch.testing.assert_close(logvar.grad, z.detach() / 2)


@by_id(SHORT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(case, impl):
    """Strided, expanded and transposed tensors give the same results as contiguous ones."""
    plain = case.tensors(torch.float64)
    expected = observe(case, plain, None, "reference")
    strided = {}
    for name, t in plain.items():
        wide = torch.zeros(*(2 * size + 1 for size in t.shape), dtype=t.dtype)
        strided[name] = wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t).detach().requires_grad_()
    z, kl = sample(case, strided, impl)
    upstream = [random_like(z), random_like(kl)]
    upstream[0] = upstream[0].transpose(0, -1).contiguous().transpose(0, -1)
    torch.testing.assert_close(z, expected["z"])
    torch.testing.assert_close(kl, expected["kl"])
    for name, grad in zip(strided, torch.autograd.grad((z, kl), list(strided.values()), upstream), strict=True):
        torch.testing.assert_close(grad, expected[f"grad of {name}"])
    wide = {name: t[:1].expand(t.shape) for name, t in plain.items()}
    (z, kl), (z2, kl2) = (sample(case, wide, i) for i in IMPLEMENTATIONS)
    torch.testing.assert_close((z, kl), (z2, kl2))
    torch.autograd.grad(sample(case, strided, impl)[0].sum(), strided["mu"])  # an incoming gradient of stride 0


def test_channels_last():
    """The memory layout is kept, and the noise follows memory order, as in torch.randn_like."""
    mu, logvar = (
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    seen = []
    for impl in IMPLEMENTATIONS:
        torch.manual_seed(0)
        z, kl = ops.reparameterize_kl(mu, logvar, impl=impl)
        assert z.is_contiguous(memory_format=torch.channels_last)
        seen.append((z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), (mu, logvar))))
    torch.testing.assert_close(*seen)
    assert seen[1][2].is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    flat = ops.reparameterize(*(t.permute(0, 2, 3, 1).reshape(2, -1) for t in (mu, logvar)), impl=TESTED)
    assert torch.equal(flat, z.permute(0, 2, 3, 1).reshape(2, -1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0,)))
def test_empty(impl, shape):
    mu, logvar = torch.empty(shape, requires_grad=True), torch.empty(shape, requires_grad=True)
    z, kl = ops.reparameterize_kl(mu, logvar, prior_mean=1.0, impl=impl)
    assert z.shape == shape and kl.shape == shape[:1] and not kl.any()
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == logvar.grad.shape == shape
    assert ops.reparameterize(mu, logvar, num_samples=2, impl=impl).shape == (2, *shape)


def test_keys():
    """The generator's state determines the key: the same seed gives the same bits, the next call gives others, and
    generator= does not touch torch's generator."""
    mu, logvar = torch.randn(50, 7), torch.randn(50, 7)
    for impl in IMPLEMENTATIONS:
        torch.manual_seed(3)
        first, second = (ops.reparameterize(mu, logvar, impl=impl) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(first, ops.reparameterize(mu, logvar, impl=impl)) and not torch.equal(first, second)
        state = torch.get_rng_state()
        again = ops.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(3), impl=impl)
        assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(TESTED != "cpp", reason="what the C++ kernels write past the caches")
def test_sizes_that_leave_the_caches():
    """Large rows that do not start at a cache line."""
    mu, logvar = torch.randn(2, 7, 300_001, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    upstream = (mu.detach().sin(), torch.ones(7))
    results = {}
    for impl in ("reference", TESTED):
        generator = torch.Generator().manual_seed(3)
        outputs = ops.reparameterize_kl(mu, logvar, generator=generator, impl=impl)
        results[impl] = *outputs, *torch.autograd.grad(outputs, (mu, logvar), upstream)
    for actual, expected in zip(results[TESTED], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected)


def test_thread_count_does_not_matter():
    case, threads, seen = SAMPLER[-1], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(observe(case, case.tensors(torch.float32), None, TESTED))
    finally:
        torch.set_num_threads(threads)
    for first, second in itertools.pairwise(seen):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint(use_reentrant):
    """The recomputation draws the same noise, so the gradients are the same."""
    seen = []
    for wrap in (False, True):
        mu, logvar = torch.zeros(20, 9, requires_grad=True), torch.zeros(20, 9, requires_grad=True)

        def f(m, s):
            return ops.reparameterize(m, s, impl=TESTED).square()

        torch.manual_seed(0)
        z = checkpoint(f, mu, logvar, use_reentrant=use_reentrant) if wrap else f(mu, logvar)
        z.sum().backward()
        seen.append((z, mu.grad, logvar.grad))
    assert all(map(torch.equal, *seen))


def test_memory_saved_for_backward():
    """Only mu, logvar and a key of 16 bytes are saved."""
    mu, logvar, kept = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.reparameterize_kl(mu, logvar, impl=TESTED)
    assert sorted(t.nbytes for t in kept) == [16, mu.nbytes, logvar.nbytes]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap(impl):
    """randomness= works as for torch.randn: an error, the same noise for all, or different noise for each."""
    mu, logvar = torch.zeros(3, 6, 4, requires_grad=True), torch.zeros(3, 6, 4)

    def f(m, s):
        return ops.reparameterize_kl(m, s, impl=impl)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f)(mu, logvar)
    torch.manual_seed(0)
    z, kl = torch.func.vmap(f, randomness="same")(mu, logvar)
    torch.manual_seed(0)
    torch.testing.assert_close(z, f(mu[0], logvar[0])[0].expand(3, 6, 4))
    assert kl.shape == (3, 6)
    z, kl = torch.func.vmap(f, randomness="different")(mu, logvar)
    assert not torch.equal(z[0], z[1])
    assert torch.equal(torch.autograd.grad(z.sum() + kl.sum(), mu)[0], torch.ones_like(mu))
    shared = torch.func.vmap(f, in_dims=(0, None), randomness="different")(mu, logvar[0])
    assert shared[0].shape == (3, 6, 4)
    samples = torch.func.vmap(
        lambda m: ops.reparameterize(m, m, num_samples=2, impl=impl), in_dims=1, randomness="different"
    )
    assert samples(torch.zeros(6, 3, 4)).shape == (3, 2, 6, 4)


# PyTorch rounds each step of the formula, a kernel only the result.
EXTREMES = {dtype: units(dtype, 2 if dtype.itemsize == 2 else 16, 2**-11 if dtype.itemsize == 2 else 16)
            for dtype in UNIT_ROUNDOFF}  # fmt: skip


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_extremes(dtype):
    """z, kl and gradients equal eager PyTorch's for infinite, huge, tiny and NaN values."""
    values = [-math.inf, -200.0, -100.0, 0.0, 80.0, 100.0, math.inf, math.nan]
    mu = torch.tensor([[0.5, -2.0]]).repeat(len(values), 1).to(dtype)
    logvar = torch.tensor(values).view(-1, 1).expand(-1, 2).to(dtype)
    seen = []
    for impl in IMPLEMENTATIONS:
        m, s = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        torch.manual_seed(0)
        z, kl = ops.reparameterize_kl(m, s, impl=impl)
        z.float().sum().backward(retain_graph=True)
        grads = (m.grad.clone(), s.grad.clone())
        kl.sum().backward()
        seen.append((z, kl, *grads, m.grad, s.grad))
    torch.testing.assert_close(*seen, equal_nan=True, **EXTREMES[dtype])
    z = ops.reparameterize(mu, logvar, logvar_range=(-30, 20), impl=TESTED)
    assert z[:-1].isfinite().all() and z[-1].isnan().all()


def test_divergence_agrees_with_torch_distributions():
    q = torch.distributions.Normal(torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1)
    p = torch.distributions.Normal(torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.1)
    expected = torch.distributions.kl_divergence(q, p)
    arguments = {"prior_mean": p.mean, "prior_logvar": p.variance.log()}
    for impl in IMPLEMENTATIONS:
        _, kl = ops.reparameterize_kl(q.mean, q.variance.log(), **arguments, impl=impl)
        torch.testing.assert_close(kl, expected.sum(1))
        _, kl = ops.reparameterize_kl(q.mean, q.variance.log(), **arguments, free_bits=0.3, beta=2.0, impl=impl)
        torch.testing.assert_close(kl, 2 * expected.clamp(min=0.3).sum(1))
        _, kl = ops.reparameterize_kl(q.mean, q.variance.log(), prior_mean=0.5, impl=impl)
        unit = torch.distributions.Normal(
            torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        )
        torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, unit).sum(1))


def test_errors():
    x = torch.zeros(2, 3)
    for match, call in (
        ("logvar must have mu's shape", lambda: ops.reparameterize(x, x[:1])),
        ("num_samples must be", lambda: ops.reparameterize(x, x, num_samples=0)),
        ("logvar_range must be", lambda: ops.reparameterize(x, x, logvar_range=(1, -1))),
        ("free_bits must not", lambda: ops.reparameterize_kl(x, x, free_bits=-1.0)),
        ("prior_mean must broadcast", lambda: ops.reparameterize_kl(x, x, prior_mean=torch.zeros(2))),
        ("at least 1 dimension", lambda: ops.reparameterize(x[0, 0], x[0, 0])),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"logvar is torch\.float64"):
        ops.reparameterize(x, x.double())
    with pytest.raises(TypeError, match="mu must be float32"):
        ops.reparameterize(x.long(), x)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_other_instruction_sets(isa):
    code = """
from tests.ops.test_reparameterize import SAMPLER, UNIT_ROUNDOFF, check_parity
for case in SAMPLER:
    for dtype in UNIT_ROUNDOFF:
        check_parity(case, dtype)
"""
    run_python(code, environment={"FASTGEN_CPU_ISA": isa})


def test_default_kernels(tmp_path):
    """Without the native library the registered ops run in plain PyTorch and give the reference's results."""
    code = """
import torch
from fastgen.ops import _dispatch
from tests.cases import SAMPLER
from tests.support.observe import observe
for case in SAMPLER:
    tensors = case.tensors(torch.float64)
    expected = observe(case, tensors, None, "reference")
    choose, _dispatch._choose = _dispatch._choose, lambda *_: "cpp"
    found = observe(case, tensors, None, "cpp")
    _dispatch._choose = choose
    torch.testing.assert_close(found, expected)
"""
    run_python(code, environment={"FASTGEN_BUILD": "0", "FASTGEN_CACHE_DIR": str(tmp_path)})
