"""fastgen.nn.spectral_norm compared with both of PyTorch's, and for all weights of a model at once."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize

import fastgen.nn
from fastgen.ops import _spectral_convolution
from tests.support.process import run_ranks
from tests.support.tolerance import FLOAT32, FLOAT64, units

pytestmark = pytest.mark.usefixtures("fused_when_small")

LAYERS = {
    "Linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 4), (2, 3, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(9, 4), None),
}


def pair(make, wrap=fastgen.nn.spectral_norm, wrap_reference=parametrizations.spectral_norm, **options):
    made = []
    for norm in (wrap, wrap_reference):
        torch.manual_seed(0)
        made.append(norm(make().double(), **options))
    return made


def data(shape):
    return torch.arange(5) if shape is None else torch.randn(shape, dtype=torch.float64)


def vectors(layer, name="weight"):
    norm = layer.parametrizations[name][0]
    return norm._u.clone(), norm._v.clone()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", ({}, {"n_power_iterations": 3, "eps": 1e-4}, {"dim": -1}), ids=str)
def test_as_the_parametrization(kind, options):
    """The same weights, outputs, gradients, vectors and state_dict from the same seed, in training and eval."""
    make, shape = LAYERS[kind]
    module, reference = pair(make, **options)
    x = data(shape)
    for training in (True, True, False):
        for layer in (module, reference):
            layer.train(training).zero_grad()
            (
                layer(x) - layer(x * 2 if x.is_floating_point() else x)
            ).square().sum().backward()  # two accesses, one graph
        torch.testing.assert_close(module.weight, reference.weight)
        torch.testing.assert_close(vectors(module), vectors(reference))
        for a, b in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert list(module.state_dict()) == list(reference.state_dict())
    module.load_state_dict(reference.state_dict())
    reference.load_state_dict(module.state_dict())
    assert parametrize.remove_parametrizations(module, "weight") is module and type(module) is type(make())


ITERATED = units(torch.float32, 2**14, 2**10)  # 30 iterations leave this much of the other singular vectors


@pytest.mark.parametrize("kind", LAYERS)
def test_loads_the_older_state_dict(kind):
    """weight_orig, weight_u and weight_v, also within a model, and without weight_v as in very old files."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)  # with other seeds singular values may be too close for 30 iterations (one weight in 120)
    old = nn.ModuleDict({"layer": nn.utils.spectral_norm(make().double())})
    for _ in range(30):
        old["layer"](data(shape))
    old.eval()["layer"](data(shape))
    for drop in ((), ("layer.weight_v",)):
        new = nn.ModuleDict({"layer": fastgen.nn.spectral_norm(make().double())})
        state = {name: value for name, value in old.state_dict().items() if name not in drop}
        new.load_state_dict(state)
        torch.testing.assert_close(new.eval()["layer"].weight, old["layer"].weight, **ITERATED)
    new.load_state_dict(new.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        new.load_state_dict({"layer.weight_orig": old["layer"].weight_orig})


def test_vector_and_other_names():
    module, reference = pair(lambda: nn.LSTM(3, 4), name="weight_hh_l0")
    torch.testing.assert_close(module.weight_hh_l0, reference.weight_hh_l0)
    module, reference = pair(lambda: nn.LayerNorm(6))
    torch.testing.assert_close(module.weight, reference.weight)
    assert list(module.state_dict()) == list(reference.state_dict())
    with pytest.raises(ValueError, match="name must be"):
        fastgen.nn.spectral_norm(nn.Linear(2, 2), "wheight")
    with pytest.raises(ValueError, match="n_power_iterations"):
        fastgen.nn.spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(IndexError, match="dim"):
        fastgen.nn.spectral_norm(nn.Linear(2, 2), dim=2)


def test_bfloat16_and_compile():
    layer = fastgen.nn.spectral_norm(nn.Linear(16, 8)).bfloat16()
    assert layer.weight.dtype == layer.parametrizations.weight[0]._u.dtype == torch.bfloat16
    torch._dynamo.reset()
    layer = fastgen.nn.spectral_norm(nn.Linear(16, 8))
    eager, x = copy.deepcopy(layer), torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (compiled, eager):
        call(x).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, eager.parametrizations.weight.original.grad)
    torch.testing.assert_close(vectors(layer), vectors(eager))


def discriminator(norm=fastgen.nn.spectral_norm):
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(8, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), norm(nn.Linear(16 * 4, 1)),
    )  # fmt: skip


def same_step(model, group, x, y, separate):
    """A training step with a hinge-like loss and one power iteration: by the group, or else by hand."""
    model.zero_grad()
    losses = model(x).mean(), -model(y).mean()
    for loss in losses if separate else (sum(losses),):
        loss.backward()


@pytest.mark.parametrize("separate", (False, True))
@pytest.mark.parametrize("norm", (fastgen.nn.spectral_norm, parametrizations.spectral_norm))
def test_group(separate, norm):
    """One iteration per step for all weights; the gradients equal those of weights computed one by one, in one graph or
    two."""
    model, single = discriminator(norm), discriminator()
    before = list(model.state_dict())
    group = fastgen.nn.SpectralNormGroup(model)
    assert len(group) == 3 and list(model.state_dict()) == before
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, single)]
    launches = []
    update = group.update
    group.update = lambda: launches.append(update())
    for step in range(3):
        x, y = torch.randn(2, 4, 3, 8, 8)
        same_step(model, group, x, y, separate)
        assert len(launches) == step + 1
        single.train()
        single.zero_grad()
        loss = single(x).mean()
        single.eval()  # no second iteration
        (loss - single(y).mean()).backward()
        for a, b in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(list(model.buffers()), list(single.buffers()))
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), single.eval()(x), **FLOAT32)
    assert [sigma.item() > 0 for sigma in group.sigmas()] == [True] * 3
    group.remove()
    assert torch.equal(model(x), model(x))


def test_group_gradient_penalty():
    """Second derivatives, as in R1, go through sigma."""
    found = []
    for grouped in (True, False):
        model = discriminator().double()
        if grouped:
            fastgen.nn.SpectralNormGroup(model)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_group_copies_casts_and_loads():
    model = discriminator()
    fastgen.nn.SpectralNormGroup(model)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    with torch.inference_mode():
        model.eval()(x)
    model(x).sum().backward()
    twin = copy.deepcopy(model.train())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert not torch.equal(twin.eval()(x), model.eval()(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    twin.double()
    torch.testing.assert_close(twin(x.double()).float(), model(x), **FLOAT32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    with pytest.raises(ValueError, match="model has no weight of 2 or more dimensions"):
        fastgen.nn.SpectralNormGroup(nn.Linear(2, 2))


def test_group_sees_vectors_and_swapped_parameters():
    """u and v that were loaded or overwritten, and parameters of functional_call, whose memory is soon reused."""
    model = discriminator().eval()
    single, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    fastgen.nn.SpectralNormGroup(model)
    with torch.no_grad():
        model(x)
        vectors = {name: F.normalize(torch.randn_like(value), dim=0) for name, value in model.named_buffers()}
        for one in (model, single):
            one.load_state_dict(vectors, strict=False)
        torch.testing.assert_close(model(x), single(x))
        for one in (model, single):
            one[0].parametrizations.weight[0]._u.copy_(torch.ones(8) / 8**0.5)
        torch.testing.assert_close(model(x), single(x))
        for step in range(1, 20):
            found = []
            for one in (model, single):
                swapped = {name: step * value + 1 for name, value in one.named_parameters()}
                found.append(functional_call(one, swapped, (x,)))
                del swapped
            torch.testing.assert_close(*found)
    with torch.inference_mode():
        made = discriminator()
        fastgen.nn.SpectralNormGroup(made)
        torch.testing.assert_close(made.eval()(x), discriminator().eval()(x))


FIRST_VECTORS = units(torch.float32, 1024, 16)  # the first vectors have float32 precision, the rest is float64


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("grouped", (False, True))
def test_functional_transforms(grouped, training):
    """Gradients, per-sample gradients and forward-mode derivatives; the vectors are updated as PyTorch's are."""
    x, found = torch.randn(3, 3, 8, 8, dtype=torch.float64), []
    for norm in (fastgen.nn.spectral_norm, parametrizations.spectral_norm):
        model = discriminator(norm).double().train(training)
        if grouped and norm is fastgen.nn.spectral_norm:
            fastgen.nn.SpectralNormGroup(model)
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters, x, model=model):
            return functional_call(model, parameters, (x,)).square().mean()

        found.append([grad(loss)(parameters, x), *(value.clone() for value in model.buffers())])
        each = vmap(grad(lambda parameters, image, loss=loss: loss(parameters, image[None])), (None, 0))
        found[-1] += [each(parameters, x), *(value.clone() for value in model.buffers())]
        model.eval()  # PyTorch's has none in training
        found[-1] += [jvp(lambda parameters, loss=loss: loss(parameters, x), (parameters,), (parameters,))]
    torch.testing.assert_close(*found, **FIRST_VECTORS)


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(16, 32, 4, 2, 1),
    "transposed": lambda: nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False),
    "reflect": lambda: nn.Conv2d(16, 32, 3, 1, 1, padding_mode="reflect"),
    "grouped": lambda: nn.ConvTranspose2d(32, 32, 3, 2, 1, groups=2),
}


def penalized(model, group, x):
    """Two calls, the second with a gradient penalty: outputs, gradients and vectors."""
    if group:
        group = fastgen.nn.SpectralNormGroup(model)
    x = x.detach().requires_grad_()
    y = model(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (model(x * 2).mean() + grad.square().sum()).backward()
    with torch.no_grad():
        evaluated = copy.deepcopy(model).eval()(x)
    return [y, grad, x.grad, *(p.grad for p in model.parameters()), *model.buffers(), evaluated]


@pytest.mark.parametrize("grouped", (False, True))
@pytest.mark.parametrize("activation", (None, nn.ReLU(), nn.LeakyReLU(0.2, inplace=True)), ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sigma_in_the_epilogue(kind, activation, grouped, monkeypatch):
    """A fused run divides its kernel's sums by sigma. The oracle is the parametrization's own quotient, up to second
    derivatives."""
    torch.manual_seed(0)
    norm = fastgen.nn.spectral_norm(CONVOLUTIONS[kind]().double())
    last = nn.Identity() if activation is None else activation
    model, x = fastgen.nn.Sequential(norm, last), torch.randn(8, norm.in_channels, 8, 8, dtype=torch.float64)
    seen = []
    convolution = _spectral_convolution.convolution
    monkeypatch.setattr(_spectral_convolution, "convolution", lambda *inputs: seen.append(1) or convolution(*inputs))
    with fastgen.ops.use_impl("cpp"):
        actual = penalized(copy.deepcopy(model), grouped, x)
    assert len(seen) == 3
    expected = penalized(nn.Sequential(*model), grouped, x)
    assert len(seen) == 3
    torch.testing.assert_close(actual, expected, **FLOAT64)


SUMMED = units(torch.float32, 1024, 1024)  # a thousand products, divided by sigma before or after they are summed


def test_the_divided_weight_is_not_written(monkeypatch):
    """Not with auto either, where the fused kernel is faster; yet the weight is computed when it is read."""
    torch.manual_seed(0)
    layer = fastgen.nn.spectral_norm(nn.Conv2d(64, 128, 4, 2, 1))
    model, x = fastgen.nn.Sequential(layer, nn.ReLU()), torch.randn(16, 64, 16, 16)
    group = fastgen.nn.SpectralNormGroup(model)
    divided = []
    update = fastgen.ops.spectral_norm_group
    monkeypatch.setattr(
        fastgen.ops, "spectral_norm_group", lambda *a, **b: divided.append(b["divide"]) or update(*a, **b)
    )
    y = model(x)
    assert divided == [False]
    torch.testing.assert_close(y, F.relu(F.conv2d(x, layer.weight, layer.bias, 2, 1)), **SUMMED)
    group.update()
    assert divided == [False, True]
    layer.register_forward_hook(lambda *_: None)  # now the module's own forward runs, with its weight
    model(x)
    assert divided == [False, True]


@pytest.mark.parametrize("output_padding", ((), (1, 1)))
def test_opcheck_of_the_epilogue(output_padding):
    x, weight = torch.randn(2, 16, 4, 4, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)
    geometry = ((2, 2), (1, 1), output_padding, 1, (1, 1), False)
    arguments = (x, weight, torch.tensor(2.0), torch.randn(16, requires_grad=True), "relu", 0.0, *geometry)
    torch.library.opcheck(torch.ops.fastgen.spectral_convolution.default, arguments)


DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
from tests.nn.test_spectral_norm import discriminator, same_step
import fastgen.nn

rank, file, grouped = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
torch.set_num_threads(1 + rank)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
model = discriminator()
group = fastgen.nn.SpectralNormGroup(model) if grouped else None
ddp = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
torch.manual_seed(rank)
for _ in range(3):
    same_step(ddp, group, *torch.randn(2, 4, 3, 8, 8), separate=False)
    optimizer.step()
for t in [*model.buffers(), *model.parameters()]:
    both = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(both, t.detach().contiguous())
    assert torch.equal(*both)
dist.destroy_process_group()
os._exit(0)  # gloo's threads may abort an interpreter that ends in the usual way
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("grouped", ("0", "1"))
def test_all_ranks_have_the_same_vectors(tmp_path, grouped):
    """DistributedDataParallel, the discriminator called twice in one graph, another thread count on each rank."""
    run_ranks(DISTRIBUTED, 2, tmp_path / "store", grouped)


def test_step_differs_from_calls():
    """Without a group each access in training is an iteration; in eval none is."""
    layer = fastgen.nn.spectral_norm(nn.Linear(6, 5))
    seen = [vectors(layer)[0] for _ in range(3) if layer.weight is not None]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    layer.eval()
    kept = vectors(layer)
    expected = layer.parametrizations.weight.original / (kept[0] @ layer.parametrizations.weight.original @ kept[1])
    torch.testing.assert_close(layer.weight, expected)
    assert torch.equal(vectors(layer)[0], kept[0])
    assert abs(F.normalize(kept[0], dim=0).norm() - 1) < 1e-6
