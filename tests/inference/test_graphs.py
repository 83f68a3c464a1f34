"""Engine on a GPU, tested without one: a fake recorder keeps the buffers, as a CUDA graph does, and repeats the
call."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastgen
from fastgen.errors import FastgenError
from fastgen.inference import Part, _graphs
from fastgen.inference._backends import TorchBackend
from fastgen.inference._engine import graph_backend
from fastgen.inference._graphs import Graphs, Recorded, multiplying
from fastgen.ops import implementations_used
from tests.support.networks import ResnetGenerator


class Recorder:
    def __init__(self):
        self.shapes = []

    def __call__(self, call, x):
        self.shapes.append(tuple(x.shape))
        input = x.clone()
        result = call(input)
        return Recorded(input, result, lambda: result.copy_(call(input)))


def networks():
    yield "dcgan", fastgen.create_model("dcgan").generator, torch.randn(2, 100)
    yield "resnet", ResnetGenerator(8, 2), torch.randn(2, 3, 16, 16)
    sn = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    yield "spectral norm", sn, torch.randn(2, 3, 8, 8)


# Relative to the largest entry. Up to ten convolutions with instance norms amplify the roundings of 16 bits, 2**-9 and
# 2**-12; on a CPU tf32 is float32.
ALLOWED = {"fp32": 1e-5, "tf32": 1e-5, "bf16": 0.1, "fp16": 0.02}


@pytest.mark.parametrize("precision", ALLOWED)
def test_the_same_as_the_module(precision):
    for name, model, x in networks():
        model = model.eval()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
        expected = [model(t).detach() for t in (x, x[:1], torch.cat([x, x]))]
        recorder = Recorder()
        graphs = Graphs(fastgen.inference.fuse(model), precision, "auto", recorder)
        for _ in range(2):
            for t, exact in zip((x, x[:1], torch.cat([x, x])), expected, strict=True):
                found = graphs(t)
                assert found.dtype == torch.float32
                assert (found - exact).abs().max() / exact.abs().max() < ALLOWED[precision], name
        assert [shape[0] for shape in recorder.shapes] == [2, 1, 4]  # each recorded once


def test_results_do_not_share_memory_and_threads_take_turns():
    _, model, _ = next(networks())
    graphs = Graphs(model.eval(), "fp32", "auto", Recorder())
    inputs = [torch.randn(3, 100) for _ in range(4)]
    expected = [graphs(x) for x in inputs]
    assert len({t.data_ptr() for t in expected}) == 4
    wrong = []

    def run(x, y):
        for _ in range(5):
            if not torch.equal(graphs(x), y):
                wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_is_the_callers_choice():
    model, x = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    graphs = Graphs(model, "fp32", "auto", Recorder())
    with torch.inference_mode():
        within = graphs(x.clone())
    assert torch.equal(graphs(x), within)


def test_autocast_is_the_callers_choice():
    model, x = nn.Linear(30, 20).eval(), torch.randn(4, 30)
    graphs = Graphs(model, "fp32", "auto", lambda call, x: Recorded(x.clone(), call(x), lambda: None))
    with torch.autocast("cpu"):
        found = graphs(x)
    torch.testing.assert_close(found, model(x))


def test_several_outputs():
    class Two(nn.Linear):
        def forward(self, x):
            return [super().forward(x), x.abs()]

    model, x = Two(3, 2).eval(), torch.randn(4, 3)
    graphs = Graphs(model, "fp32", "auto", lambda call, x: Recorded(x.clone(), call(x), lambda: None))
    found = graphs(x)
    assert isinstance(found, tuple)
    for y, expected in zip(found, model(x), strict=True):
        torch.testing.assert_close(y, expected)


def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(_graphs, "MAX_GRAPHS", 2)
    recorder = Recorder()
    graphs = Graphs(nn.Linear(3, 2), "fp32", "auto", recorder)
    for n in (1, 2, 1, 3, 1, 2):
        graphs(torch.randn(n, 3))
    assert [shape[0] for shape in recorder.shapes] == [1, 2, 3, 2]


def test_a_graph_is_recorded_on_the_inputs_gpu(monkeypatch):
    """On a stream of that GPU, because PyTorch's default capture stream is on the GPU of the process's first graph."""
    current, made = [], []

    @contextlib.contextmanager
    def within(device):
        current.append(device)
        yield
        current.pop()

    def stream():
        made.append(SimpleNamespace(device=current[-1], wait_stream=lambda other: None))
        return made[-1]

    def graph(of, *, stream, **_):
        assert stream is made[-1] and stream.device == current[-1]
        return contextlib.nullcontext()

    for name, stand_in in {
        "device": within, "Stream": stream, "stream": contextlib.nullcontext, "graph": graph,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    x = torch.ones(2, 3)
    assert torch.equal(_graphs.record(lambda input: 2 * input, x).result, 2 * x)
    assert made[0].device == x.device


def test_precision_and_implementation_hold_while_recording():
    seen = []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return fastgen.ops.norm_act(x, norm=None)

    def record_only(call, x):
        return Recorded(x.clone(), call(x), lambda: None)

    before = implementations_used().get("norm_act", {}).get("reference", 0)
    for precision in ("tf32", "fp32"):
        graphs = Graphs(Sees(), precision, "reference", record_only)
        seen.clear()  # fuse traces the forward
        graphs(torch.randn(2, 3, 4, 4))
        assert seen == ["tf32" if precision == "tf32" else "ieee"]
    assert implementations_used()["norm_act"]["reference"] > before


def test_the_reference_of_an_engines_check_is_exact():
    """PyTorch's convolutions may use TF32 on a GPU by default. The module must not, and graphs only on request."""
    seen = []

    class Sees(nn.Conv2d):
        def forward(self, x):
            seen.append((recording, torch.backends.cudnn.conv.fp32_precision))
            return super().forward(x)

    def record_only(call, x):
        nonlocal recording
        recording = True
        result = call(x)
        recording = False
        return Recorded(x.clone(), result, lambda: result.copy_(call(x)))

    recording = False
    module = Sees(3, 4, 3).eval()
    with multiplying("fp32"):
        backend, _ = graph_backend(module, (torch.randn(2, 3, 8, 8),), "tf32", "reference", record_only)
    assert [part.runs for part in backend.parts] == ["CUDA graph"]
    assert set(seen) == {(True, "tf32"), (False, "ieee")}


def test_changing_state_prevents_a_graph():
    """A graph does not replay what Python computes."""

    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model = Counts().eval()
    backend, _ = graph_backend(model, (torch.randn(2, 3),), "bf16", "auto", Recorder())
    assert isinstance(backend, TorchBackend) and model.calls == 0
    assert backend.parts[0].reason == "calls changes with every call, also in evaluation mode"


def test_models_that_cannot_be_graphs_run_through_pytorch():
    """The model's code may raise any exception when it meets another dtype."""

    class Own(nn.Linear):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("of float32 alone")
            return super().forward(x)

    model, x = Own(3, 2).eval(), torch.randn(2, 3)
    backend, _ = graph_backend(model, (x,), "bf16", "auto", Recorder())
    assert backend.parts == (Part("", "PyTorch", "of float32 alone"),)
    assert torch.equal(backend.run(x), model(x))
    with pytest.raises(FastgenError, match="impl='triton' cannot run the whole model: of float32 alone"):
        graph_backend(model, (x,), "bf16", "triton", Recorder())


# Of outputs between -1 and 1. Here tf32 rounds too, and model(z) may use it, as PyTorch's switches say.
ALLOWED_ON_GPU = {"fp32": 0.02, "tf32": 0.02, "bf16": 0.2, "fp16": 0.02}


def test_engine_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: CUDA graphs are recorded on one")
    model, x = fastgen.create_model("dcgan").generator.cuda().eval(), torch.randn(4, 100, device="cuda")
    for precision in ALLOWED_ON_GPU:
        engine = fastgen.Engine(model, x, precision=precision)
        assert [part.runs for part in engine.parts] == ["CUDA graph"]
        for n in (1, 4, 7):
            z = torch.randn(n, 100, device="cuda")
            torch.testing.assert_close(engine(z), model(z), rtol=0, atol=ALLOWED_ON_GPU[precision])
    with pytest.raises(TypeError, match="on cuda:0"):
        engine(torch.randn(1, 100))
