"""Published networks, fused: training and inference compute the same."""

import copy

import pytest
import torch
from torch import nn

import fastgen
from tests.inference.parity import FLOAT64, TOLERANCE, assert_same_calls, assert_same_state, assert_same_training
from tests.support.networks import NETWORKS

TEN_STEPS_OF_ADAM = 100 * FLOAT64  # it divides by the root of small second moments, which amplifies differences

pytestmark = pytest.mark.usefixtures("fused_when_small")


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape, runs = NETWORKS[request.param]
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # so that no affine norm is the identity
        nn.init.uniform_(parameter, -0.3, 0.4)
    return model, torch.rand(shape) * 2 - 1, runs


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_gradients_and_statistics(network, dtype):
    model, x, _ = network
    model, x = model.to(dtype), x.to(dtype)
    assert_same_calls(fastgen.fuse(model), model, x, TOLERANCE[dtype])


def test_ten_steps_of_adam(network):
    model, x, _ = network
    model, x = model.double(), x.double()
    assert_same_training(
        fastgen.fuse(model), model, x, lambda p: torch.optim.Adam(p, 1e-3, (0.5, 0.999)), TEN_STEPS_OF_ADAM
    )


def test_ten_steps_of_sgd_in_float32(network):
    model, x, _ = network
    assert_same_training(fastgen.fuse(model), model, x, lambda p: torch.optim.SGD(p, 1e-2, 0.9), TOLERANCE[x.dtype])


def test_the_report_names_the_runs(network):
    model, _, runs = network
    report = fastgen.fusion_report(model)
    assert report.fused == () and {run.names[0]: len(run.names) for run in report.fusable} == runs
    after = fastgen.fusion_report(fastgen.fuse(model))
    assert (after.fused, after.fusable, after.left) == (report.fusable, (), report.left)
    every = {name for name, _ in model.named_modules()}
    assert all(name in every for run in report.fusable for name in run.names)
    assert all(left.name in every and left.reason for left in report.left)


def test_state_dicts_load_both_ways(network):
    model, x, _ = network
    fused = fastgen.fuse(model)
    for source, target in ((fused, copy.deepcopy(model)), (model, copy.deepcopy(fused))):
        for parameter in target.parameters():
            nn.init.zeros_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(target, source, 0.0)
        assert_same_calls(target, copy.deepcopy(source), x, TOLERANCE[x.dtype])


def test_model_itself_is_not_touched(network):
    model, _, _ = network
    before = [(name, type(module), list(vars(module))) for name, module in model.named_modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fastgen.fusion_report(model)
    fused = fastgen.fuse(model)
    assert [(name, type(module), list(vars(module))) for name, module in model.named_modules()] == before
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert fused is not model and not shared
    modes = [(m.training, type(m).__name__) for m in model.modules()]
    assert [(m.training, type(m).__name__) for m in fused.modules()] == modes
    assert all(isinstance(f, type(m)) for f, m in zip(fused.modules(), model.modules(), strict=True))
