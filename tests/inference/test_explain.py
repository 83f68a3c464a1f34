"""fastgen.explain: its answer is what runs, and each reason is that of the deciding rule."""

import pytest
import torch
from torch import nn

import fastgen
from fastgen import ops
from fastgen.ops import _memo, _processor
from tests.cases import PROCESSORS, TESTED

pytestmark = pytest.mark.skipif(TESTED != "cpp", reason="another's kernels run in the C++ kernels' place")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2), nn.GroupNorm(4, 64), nn.SiLU())
        self.small = nn.Sequential(nn.Conv2d(64, 3, 1), nn.Tanh())
        self.norm = nn.Sequential(nn.InstanceNorm2d(3), nn.ReLU())
        self.alone = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.alone(self.norm(self.small(self.wide(self.up(x)))))


def test_each_layer(monkeypatch):
    """The answers follow the rules for AVX-512 and are in the order of the calls."""
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS["avx512"])
    _memo.forget()
    model, x = Net(), torch.randn(8, 64, 16, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = fastgen.explain(model, x)
    torch.testing.assert_close(model.state_dict(), state)
    forward = {row.layer: row.choice for row in found.rows if row.what == "forward"}
    assert {layer: choice.implementation for layer, choice in forward.items()} == {
        "up.0 + up.1 + up.2": "cpp",
        "wide.0 + wide.1 + wide.2": "unfused",
        "small.0 + small.1": "modules",
        "norm.0 + norm.1": "cpp",
        "alone": "modules",
    }
    assert "rule 'transposed, 4x4, stride 2'" in forward["up.0 + up.1 + up.2"].reason
    assert "rule 'direct'" in forward["wide.0 + wide.1 + wide.2"].reason
    assert "too small" in forward["small.0 + small.1"].reason
    gradients = {(row.layer[:4], row.what): row.choice.implementation for row in found.rows if row.what != "forward"}
    # The model's input needs no gradient.
    assert gradients == {
        ("up.0", "weight_grad"): "cpp",
        ("wide", "input_grad"): "torch",
        ("wide", "weight_grad"): "torch",
    }
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "pass", "computed", "by", "because"] and len(lines) == 1 + len(found.rows)
    _memo.forget()


def test_it_says_what_runs():
    """A training step runs exactly the implementations that it names."""
    model, x = Net(), torch.randn(8, 64, 16, 16)
    named = {row.choice.implementation for row in fastgen.explain(model, x).rows if row.what == "forward"}
    before = ops.implementations_used()
    fastgen.fuse(model)(x)
    ran = {
        implementation
        for op, counts in ops.implementations_used().items()
        for implementation, count in counts.items()
        if count > before.get(op, {}).get(implementation, 0)
    }
    assert ran == named


def test_a_requested_implementation():
    with fastgen.use_impl("reference"):
        found = fastgen.explain(Net().eval(), torch.randn(1, 64, 16, 16), training=False)
    choices = {row.choice[::2] for row in found.rows if row.layer != "alone"}
    assert choices == {("reference", "reference is requested")}
    with pytest.raises(TypeError, match="model must be a"):
        fastgen.explain(3, torch.zeros(1))


def test_inputs_and_random_numbers_stay():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(2, 3, 8, 8)
    before, state = x.clone(), torch.get_rng_state()
    fastgen.explain(model, x)
    assert x.equal(before) and torch.get_rng_state().equal(state)


def test_a_model_without_convolutions():
    table = str(fastgen.explain(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(1, 3)))
    assert table.startswith("nothing to explain: the call ran no layers")


def test_a_single_layer_as_the_model():
    (row,) = fastgen.explain(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)).rows
    assert row.layer == "model" and row.choice.implementation == "modules"
    assert row.choice.reason == "no activation or norm that can be fused comes right after it"


def test_inputs_that_are_no_tensors():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def forward(self, x, factor):
            return self.layers(x.mul_(factor))

    x = torch.ones(1, 3, 8, 8)
    assert fastgen.explain(Scaled(), x, 2.0).rows and x.equal(torch.ones_like(x))
