"""An engine in parts: each module that no plan computes is named with its own reason."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.errors import FastgenError, UsageError
from fastgen.inference import Part
from tests.inference.layers import iterated
from tests.inference.parity import NETWORK


class Call(nn.Module):
    """A module that computes function(self, *inputs) with these submodules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def conv(i=3, o=8):
    return nn.Conv2d(i, o, 3, padding=1)


def run_of(channels, length):
    return nn.Sequential(*[m for _ in range(length) for m in (conv(channels, channels), nn.ReLU())])


def assert_same(engine, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(engine(*inputs), model(*inputs), **NETWORK)


def parts(engine):
    return {part.name: part.reason or part.runs for part in engine.parts}


ALONE = "a plan for it alone would gain nothing"
CASES = {
    "a constant of the model's code": (
        lambda: Call(lambda m, x: m.conv(x - torch.full((1, 3, 1, 1), 0.4)), conv=conv()),
        {"": "sub of values and constants", "conv": "plan"},
    ),
    "a ModuleList": (
        lambda: Call(lambda m, x: m.body[2](m.body[1](m.body[0](x))), body=nn.ModuleList([conv(), nn.PReLU(), conv(8,
        4)])), {"": "prelu", "body.0": "plan", "body.1": "prelu", "body.2": "plan"},
    ),
    "attention": (
        lambda: Call(
            lambda m, x: m.last(torch.bmm(m.first(x).flatten(2).softmax(1), m.first(x).flatten(2).mT)[..., None, :]),
            first=conv(), last=conv(8, 4),
        ),
        {"": "softmax", "first": "plan", "last": "plan"},
    ),
    "old spectral norm beside what no plan has": (
        lambda: iterated(
            nn.Sequential(nn.utils.spectral_norm(conv()), nn.GLU(dim=1), nn.utils.spectral_norm(conv(4)), nn.GELU())
        ),
        {"0": "plan", "1": "glu", "2": "plan", "3": "gelu"},
    ),
    "each its own reason": (
        lambda: nn.Sequential(nn.GELU(), conv(), nn.Softmax(1), nn.ReLU(), nn.GLU(1), conv(4), nn.ReLU()),
        {"0": "gelu", "1": "plan", "2": "softmax", "3": ALONE, "4": "glu", "5 to 6": "plan"},
    ),
    "blocks in a Sequential": (
        lambda: nn.Sequential(
            conv(3, 4), Call(lambda m, x: x + F.gelu(m.a(x)), a=conv(4, 4)), nn.Sequential(conv(4, 4), nn.GELU())
        ),
        {"0": "plan", "1": "gelu", "1.a": "plan", "2.0": "plan", "2.1": "gelu"},
    ),
    "a TorchScript module within": (
        lambda: nn.Sequential(conv(), torch.jit.script(nn.Sequential(nn.ReLU(), conv(8, 4))), conv(4, 4)),
        {"0": "plan", "1": "it is a TorchScript module, whose calls cannot be seen", "2": "plan"},
    ),
    "float64 within": (
        lambda: Call(lambda m, x: m.b(m.a(x).double()), a=conv(), b=conv(8, 4).double()),
        {"": "plans compute float32, not torch.float64", "a": "plan", "b": "plans compute float32, not torch.float64"},
    ),
    "called twice, with two shapes": (
        lambda: Call(lambda m, x: m.a(x)[..., 1:].softmax(1) + m.a(x[..., 1:]), a=conv()),
        {"": "indexing", "a": "it is called with arguments other than tensors, or with several shapes"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_are_named_with_their_own_reasons(name, tmp_path, caplog):
    make, expected = CASES[name]
    model, x = make().eval(), torch.randn(2, 3, 8, 8)
    engine = fastgen.Engine(model, x)
    found = parts(engine)
    if "plan" not in expected.values():  # all of it runs through PyTorch, for one reason
        expected = {"": expected[""]}
    assert found.keys() == expected.keys()
    assert all(found[name].startswith(reason) for name, reason in expected.items())
    assert_same(engine, model, torch.randn(5, 3, 8, 8))
    left = [reason for reason in expected.values() if reason != "plan"]
    with pytest.raises(FastgenError) as error:
        engine.save(tmp_path / "a.fgplan")
    assert all(reason in str(error.value) and reason in caplog.text for reason in left) and not list(tmp_path.iterdir())


def scripted(model, x):
    return torch.jit.script(model)


def traced(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def frozen(model, x):
    return torch.jit.freeze(torch.jit.script(model))


@pytest.mark.parametrize("make", (scripted, traced, frozen))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_runs_through_pytorch(make, tmp_path):
    model, x = nn.Sequential(nn.ConvTranspose2d(6, 4, 4), nn.ReLU()).eval(), torch.randn(2, 6, 1, 1)
    module = make(model, x)
    torch.jit.save(module, tmp_path / "a.pt")
    for each in (module, torch.jit.load(tmp_path / "a.pt")):
        engine = fastgen.Engine(each, x)
        assert engine.parts == (Part("", "PyTorch", "it is a TorchScript module, whose calls cannot be seen"),)
        assert_same(engine, model, x)
        with pytest.raises(FastgenError, match="TorchScript"):
            fastgen.Engine(each, x, impl="cpp")


def by_label(m, x, y):
    return m.body(x + m.label(y)[:, :, None, None]).softmax(1)


def test_several_inputs_run_in_parts():
    model, y = Call(by_label, body=run_of(8, 2), label=nn.Embedding(10, 8)).eval(), torch.tensor([3, 1])
    engine = fastgen.Engine(model, (torch.randn(2, 8, 8, 8), y))
    assert parts(engine) == {"": "softmax", "body": "plan", "label": ALONE}
    assert_same(engine, model, torch.randn(5, 8, 8, 8), torch.arange(5))
    block = Call(lambda m, x, y: m.conv(x) * m.table(y)[:, :, None, None], conv=conv(8, 8), table=nn.Embedding(10, 8))
    model = Call(lambda m, x, y: F.gelu(m.block(x, y)), block=block).eval()
    engine = fastgen.Engine(model, (torch.randn(2, 8, 8, 8), y))
    assert parts(engine) == {"": "gelu", "block": "plan"}
    assert_same(engine, model, torch.randn(5, 8, 8, 8), torch.arange(5))


INPUTS = {
    "timesteps": (torch.rand(2), r"input 1 is float32 \(2,\)"),
    "whole timesteps": (torch.tensor([1, 2], dtype=torch.uint8), r"input 1 is uint8 \(2,\)"),
    "tokens": (torch.zeros(2, 7, dtype=torch.int64), r"input 1 is int64 \(2, 7\)"),
    "a mask": (torch.ones(2, 1, 8, 8, dtype=torch.bool), r"input 1 is bool \(2, 1, 8, 8\)"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), r"input 1 is complex64 \(2, 3\)"),
    "float64": (torch.ones(2, 3, dtype=torch.float64), r"input 1 is float64 \(2, 3\)"),
    "a sequence": (torch.ones(2, 3, 4), r"input 1 is float32 \(2, 3, 4\)"),
    "sparse": (torch.ones(2, 3).to_sparse(), r"input 1 is float32 \(2, 3\) of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_no_plan_takes_run_in_parts(name):
    other, words = INPUTS[name]

    def forward(m, x, t):
        t = (t.to_dense() == 1).to(x.dtype).flatten(1).mean(1) if t.dim() > 1 else t.to(x.dtype)
        return m.conv(x) + m.time(t[:, None])[:, :, None, None]

    model, x = Call(forward, conv=conv(), time=nn.Linear(1, 8)).eval(), torch.randn(2, 3, 8, 8)
    for inputs in ((x, other), (other, x)):
        ordered = model if inputs[0] is x else Call(lambda m, t, x: m.model(x, t), model=model).eval()
        engine = fastgen.Engine(ordered, inputs)
        planned = [part.runs for part in engine.parts if part.name.endswith(("conv", "time"))]
        assert planned == ([] if other.is_sparse else ["plan", "plan"])
        assert_same(engine, ordered, *inputs)
    with pytest.raises(FastgenError, match=words):
        fastgen.Engine(model, (x, other), impl="cpp")


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.complex64, torch.float64))
def test_a_first_input_that_no_plan_takes(dtype):
    model = Call(lambda m, x: m.conv(torch.view_as_real(x + 0j).sum(-1).float()), conv=conv()).eval()
    x = torch.randn(2, 3, 8, 8).to(dtype)
    engine = fastgen.Engine(model, x)
    assert engine.parts[0].reason.startswith(f"input 0 is {str(dtype)[6:]} (2, 3, 8, 8)")
    assert_same(engine, model, x)


def test_a_batch_is_still_needed():
    for inputs in (torch.rand(3), torch.tensor(3.0), (torch.rand(2, 3), torch.tensor(3.0)), torch.rand(0, 3)):
        with pytest.raises(UsageError, match="at least one"):
            fastgen.Engine(nn.Linear(3, 3), inputs)


def test_a_failure_only_while_recording_is_a_reason():
    """The model's own code works, but raises while it is recorded."""

    def forward(m, x):
        if torch._C._len_torch_function_stack():
            raise KeyError("a mode")
        return m.conv(x)

    model, x = Call(forward, conv=conv()).eval(), torch.randn(1, 3, 8, 8)
    engine = fastgen.Engine(model, x)
    assert parts(engine) == {"": "it cannot be recorded: KeyError: 'a mode'", "conv": "plan"}
    with pytest.raises(ZeroDivisionError):  # an error that the model also raises without recording is raised
        fastgen.Engine(Call(lambda m, x: 1 / 0).eval(), x)


PERCEPTRON = {"fp32": 1e-5, "bf16": 0.02}  # a few roundings of values near 1


@pytest.mark.parametrize("precision", PERCEPTRON)
@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("last", ("linear", "activation", "norm", "pooled"))
def test_perceptrons_that_end_in_an_image(last, channels, precision, tmp_path):
    size = channels * 64
    layers = {
        "linear": [], "activation": [nn.Tanh()], "norm": [nn.BatchNorm1d(size), nn.Tanh()],
        "pooled": [nn.Unflatten(1, (size, 1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh()],
    }[last]  # fmt: skip
    body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, size), *layers)
    model = Call(lambda m, z: m.body(z).view(len(z), channels, 8, 8), body=body).eval()
    engine = fastgen.Engine(model, torch.randn(2, 6), precision=precision, impl="cpp")
    engine.save(tmp_path / "a.fgplan")
    loaded = fastgen.runtime.Plan.load(tmp_path / "a.fgplan")
    for n in (1, 5, 20):
        z = torch.randn(n, 6)
        found = engine(z)
        torch.testing.assert_close(found, model(z).detach(), rtol=0, atol=PERCEPTRON[precision])
        np.testing.assert_array_equal(loaded(z.numpy()), found.numpy())
