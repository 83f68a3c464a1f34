"""An engine gives the same results under any process-wide settings and from any caller, or says why it cannot."""

import contextlib
import copy
import io
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks

import fastgen
from fastgen.errors import FastgenError
from fastgen.inference._graphs import Graphs, multiplying
from fastgen.runtime import Plan
from tests.inference.layers import iterated
from tests.inference.parity import FEW_LAYERS, FLOOR
from tests.inference.test_graphs import Recorder


class InParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Holder(nn.Module):
    """A module with an engine in it."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def forward(self, x):
        return self.engine(x)


@pytest.fixture(scope="module", params=("plan", "parts", "PyTorch"))
def made(request):
    """(function that makes an engine, an engine, an input, the output)"""
    torch.manual_seed(0)
    labelled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    model = (InParts() if request.param == "parts" else labelled).eval()
    x = torch.randn(3, 3, 8, 8)

    def make():
        engine = fastgen.Engine(model, x, impl="reference" if request.param == "PyTorch" else "auto")
        assert (engine.plan is not None) == (request.param == "plan")
        assert any(part.runs == "plan" for part in engine.parts) == (request.param != "PyTorch")
        return engine

    return make, make(), x, model(x).detach()


@contextlib.contextmanager
def changed(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


SETTINGS = {
    "default dtype": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 1 + torch.get_num_threads() % 2),
    "precision of products": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_at_creation_and_at_calls(name, made):
    make, engine, x, expected = made
    with SETTINGS[name]():
        within, found = make(), [engine(x)]
        found.append(within(x))
    for y in (*found, within(x)):
        assert y.dtype == torch.float32 and y.device.type == "cpu" and not y.requires_grad
        np.testing.assert_allclose(y.numpy(), expected.numpy(), **FEW_LAYERS)


def test_the_module_is_compared_in_full_float32_precision():
    """Otherwise the module's own errors in bfloat16 products would make the engine refuse the plan."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with SETTINGS["precision of products"]():
        before = torch.backends.mkldnn.matmul.fp32_precision
        assert fastgen.Engine(model, torch.randn(4, 256), impl="cpp").error < FLOOR["fp32"]
        with multiplying("tf32"):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == before != "ieee"


def test_labels_under_another_default():
    def model(n):
        return F.one_hot(n, 5).float()

    class Call(nn.Module):
        def forward(self, x, n):
            return self.last(torch.cat([x, model(n)], 1))

    net = Call()
    net.last = nn.Linear(8, 4)
    inputs = torch.randn(3, 3), torch.tensor([0, 4, 2])
    with SETTINGS["default device"](), SETTINGS["default dtype"]():
        found = fastgen.Engine(net.eval(), inputs, impl="cpp")
    np.testing.assert_allclose(found(*inputs).numpy(), net(*inputs).detach().numpy(), **FEW_LAYERS)


def test_models_and_examples_made_in_inference_mode():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
        expected = model(x)
    engine = fastgen.Engine(model, x, impl="cpp")
    for inputs in (x, x.clone()):
        assert torch.allclose(engine(inputs), expected, **FEW_LAYERS)


def test_layouts_and_views(made):
    _, engine, x, expected = made
    for inputs in (
        x.to(memory_format=torch.channels_last),
        x.clone().requires_grad_(),
        torch._neg_view(-x),
        x.as_subclass(nn.Parameter),
    ):
        assert torch.allclose(engine(inputs), expected, **FEW_LAYERS) and not engine(inputs).requires_grad


@pytest.mark.parametrize("copied", (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "torch.save"))
def test_copies(copied, made):
    _, engine, x, expected = made
    if copied == "torch.save":

        def copied(value):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)

    for other in (copied(engine), copied(Holder(engine))):
        assert torch.allclose(other(x), expected, **FEW_LAYERS)
    other = copied(engine)
    assert other.parts == engine.parts and repr(other) == repr(engine)
    if engine.plan is not None:
        assert torch.equal(other(x), engine(x)) and other.plan.to_bytes() == engine.plan.to_bytes()


def test_a_copy_of_graphs_records_again():
    recorder, x = Recorder(), torch.randn(2, 3)
    graphs = Graphs(nn.Linear(3, 2).eval(), "fp32", "auto", recorder)
    expected = graphs(x)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert torch.equal(other(x), expected) and other._record.shapes[-1] == (2, 3)


def test_transforms_and_tracing_are_refused(made):
    _, engine, x, _ = made
    if not any(part.runs == "plan" for part in engine.parts):
        pytest.skip("PyTorch runs all of it, and can")
    for call in (
        lambda: torch.vmap(lambda v: engine(v[None])[0])(x),
        lambda: torch.func.grad(lambda v: engine(v).sum())(x),
        lambda: torch.jit.trace(lambda v: engine(v), x),
        lambda: torch.fx.experimental.proxy_tensor.make_fx(lambda v: engine(v))(x),
    ):
        with pytest.raises((TypeError, FastgenError), match="traced"):
            call()
    with pytest.raises(TypeError, match=r"(torch\.sparse_coo|Sparse)"):
        engine(x.to_sparse())


FORKS = """
import os, pickle, sys, threading
import numpy as np
import torch
from fastgen.errors import FastgenError
x, near = torch.randn(64, 3, 32, 32), float(sys.argv[2])
with open(sys.argv[1], "rb") as file:
    plan, parts = pickle.load(file)
other_layout = x.to(memory_format=torch.channels_last)
expected, in_parts = plan(x), parts(x)  # PyTorch's threads are at work

def forked(call):
    child = os.fork()
    if child == 0:
        os._exit(0 if call() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def is_refused():
    try:
        parts(x)
    except FastgenError as error:
        return "torch.set_num_threads(1)" in str(error)

def with_one_thread():
    torch.set_num_threads(1)
    return np.allclose(parts(x).numpy(), in_parts.numpy(), rtol=near, atol=near)

forked(lambda: np.array_equal(plan(other_layout).numpy(), expected.numpy()))
forked(is_refused)
forked(with_one_thread)

# While other threads call the plan.
ended = threading.Event()
def call():
    while not ended.is_set():
        plan(x[:1])
threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(8):
    forked(lambda: plan(x[:1]).shape == (1, 4, 30, 30))
ended.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_and_spawned_processes(tmp_path):
    """A new process unpickles the engines and forks."""
    torch.manual_seed(0)
    plan = fastgen.Engine(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).eval(), torch.randn(1, 3, 32, 32), impl="cpp")
    parts = fastgen.Engine(InParts().eval(), torch.randn(1, 3, 32, 32))
    (tmp_path / "engines.pickle").write_bytes(pickle.dumps((plan, parts)))
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "FASTGEN_THREADS": "2"}
    arguments = [tmp_path / "engines.pickle", str(FEW_LAYERS["atol"])]
    subprocess.run([sys.executable, "-c", FORKS, *arguments], check=True, timeout=600, env=environment)


@pytest.mark.parametrize("register", ("register_module_forward_hook", "register_module_forward_pre_hook"))
def test_hooks_of_all_modules_are_called(register, caplog):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    before, expected, called = fastgen.Engine(model, x, impl="cpp"), model(x).detach(), []
    in_parts = fastgen.Engine(InParts().eval(), x)
    with caplog.at_level(logging.WARNING, "fastgen"):
        hook = getattr(module_hooks, register)(lambda module, *_: called.append(type(module)))
        try:
            engine = fastgen.Engine(model, x)
            with pytest.raises(FastgenError, match="global hooks"):
                fastgen.Engine(model, x, impl="cpp")
            called.clear()
            assert torch.equal(engine(x), expected) and {nn.Conv2d, nn.ReLU, nn.Sequential} == set(called)
            called.clear()
            assert torch.allclose(before(x), expected, **FEW_LAYERS) and called == []
            in_parts(x)
            assert called == [InParts]
        finally:
            hook.remove()
    assert engine.parts[0].runs == "PyTorch" and "global hooks" in caplog.text


def test_a_modules_own_hooks_are_part_of_the_plan():
    model, x = iterated(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())), torch.randn(2, 3, 8, 8)
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model.eval()
    engine = fastgen.Engine(model, x, impl="cpp")
    assert torch.allclose(engine(x), model(x), **FEW_LAYERS)


def test_copies_of_plans_keep_the_measured_choices(tmp_path):
    plan = fastgen.Engine(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8), impl="cpp").plan
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    (tmp_path / "a.fgplan").write_bytes(plan.to_bytes())
    loaded = Plan.load(tmp_path / "a.fgplan", threads=1)
    os.unlink(tmp_path / "a.fgplan")
    for other in (copy.copy(loaded), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert other.threads == 1 and other.to_bytes() == plan.to_bytes()
        np.testing.assert_array_equal(other(x), plan(x))
