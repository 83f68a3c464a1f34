"""fastgen.tune with a fake clock."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastgen
from fastgen.errors import UsageError
from fastgen.inference import _tune as tuning
from fastgen.ops import _candidates, _choices, _policy
from fastgen.ops._question import Choice
from fastgen.ops._tiers import ON_CPU
from tests.ops.measured import BY_NAME, FASTGENS, TORCHS, recorded_choices
from tests.support.tolerance import FLOAT32

if ON_CPU:
    pytest.skip("nothing is measured of kernels in another's place", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("folder", "fused_when_small")


def clock(**milliseconds):
    """Replaces tuning.milliseconds: sets the time of each call by its name."""

    def time_of(call, scratch):
        candidate = call.args[-1]  # the choice, for a kernel of fastgen
        return milliseconds[str(candidate) if isinstance(candidate, Choice) else "torch"]

    return time_of


def tiny(**options) -> nn.Module:
    return fastgen.create_model("dcgan", image_size=32, channels=1, nz=8, ngf=2, ndf=2, **options)


@pytest.mark.parametrize("faster", ("cpp", "torch"))
def test_tune(faster, monkeypatch, folder):
    times = {"cpp": 2.0, "torch": 2.0} | {faster: 1.0}
    monkeypatch.setattr(tuning, "milliseconds", clock(**times))
    model, z, lines = tiny().generator, torch.randn(3, 8), []
    state, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    report = fastgen.tune(model, z, progress=lines.append)
    torch.testing.assert_close(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random) and model.training and z.grad is None
    assert len(report.tuned) == len(lines) == 12 and not report.left_out  # four layers
    assert {row.chosen for row in report.tuned} == {faster}
    assert all(row.milliseconds == times for row in report.tuned)
    (file,) = report.files
    assert file.is_relative_to(folder / "cache")
    text = str(report).splitlines()
    assert text[0].split() == ["question", "milliseconds", "chosen", "by", "rule"] and str(file) in text[-1]
    with _policy.recorded() as questions:
        model(z.requires_grad_()).sum().backward()
    assert {str(_choices.measured(q)) for q in questions} == {faster}


def test_tune_without_gradients(monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, torch=2.0))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = fastgen.tune(model, torch.randn(2, 3, 8, 8), training=False).tuned
    assert row.question.startswith("forward conv2d 2x3x8x8 by 4x3x3x3 bfloat16 stride")
    assert (row.chosen, row.rule) == ("cpp", "torch")


def test_every_candidate_computes_the_same():
    """All candidates that tune measures give the same results."""
    for case in (FASTGENS, TORCHS, BY_NAME["conv2d_norm_act-cyclegan-first"]):
        for question in recorded_choices(case):
            found = []
            for name in _candidates.names(question):
                torch.manual_seed(0)
                out = _candidates.calls(question, [name])[name]()
                found.append(next(t for t in (out if isinstance(out, tuple) else (out,)) if t is not None))
            assert len(found) == 2
            torch.testing.assert_close(*found, **FLOAT32)


def test_the_rules_choice_stays_unless_another_is_clearly_faster():
    def fastest(rule, **medians):
        return tuning.fastest({name.replace("_", " "): [ms] * 3 for name, ms in medians.items()}, rule)

    assert fastest("cpp", cpp=1.02, torch=1.0) == "cpp"
    assert fastest("cpp", cpp=1.04, torch=1.0) == "torch"
    assert fastest("torch", torch=2.0, triton=1.01, triton_64=1.0, cuda=1.5) == "triton"
    assert fastest("triton", torch=2.0, triton=1.1, triton_64=1.0) == "triton 64"
    # Faster by the median, but not in the best round.
    assert tuning.fastest({"cpp": [1.0, 8.0, 8.0], "torch": [1.0, 1.0, 1.0]}, "cpp") == "cpp"


def test_tuning_stops_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, torch=2.0))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8), seconds=1e-9)
    assert report.tuned == () and len(report.left_out) == 12 and report.files == ()
    assert "not measured: forward conv_transpose2d" in str(report)


def test_a_candidate_that_fails_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, torch=2.0))
    monkeypatch.setattr(_candidates, "_weight_grad", lambda *_: torch.ones(2) @ torch.ones(3))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8))
    assert {row.question.split()[0] for row in report.tuned} == {"forward", "input_grad"}
    assert "tune: cpp cannot compute weight_grad conv_transpose2d" in caplog.text


def test_triton_tiles_are_tried(monkeypatch):
    """Where it is near the fastest."""
    monkeypatch.setattr(_policy, "auto_tier", lambda *_: "triton")
    monkeypatch.setattr(_candidates, "names", lambda question: ["torch", "triton"])
    monkeypatch.setattr(_candidates, "tiles", lambda question: ["triton 64x64x64x4x3", "triton 16x64x128x4x3"])
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")
    for triton, chosen in ((1.4, "triton 16x64x128x4x3"), (1.6, "torch")):
        ms = {"torch": 1.0, "triton": triton, "triton 64x64x64x4x3": 1.2, "triton 16x64x128x4x3": 0.5}
        monkeypatch.setattr(
            tuning, "_times", lambda question, names, deadline, ms=ms: {name: [ms[name]] for name in names}
        )
        report = fastgen.tune(tiny().generator, torch.randn(3, 8))
        assert {row.chosen for row in report.tuned} == {chosen}


def test_what_tune_refuses(monkeypatch):
    model = tiny().generator
    with pytest.raises(
        UsageError, match="example_inputs must contain a tensor, got int: pass the arguments of the model's call"
    ):
        fastgen.tune(model, 3)
    with pytest.raises(UsageError, match="seconds must be positive and finite, not 0"):
        fastgen.tune(model, torch.randn(3, 8), seconds=0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastgen.tune(3, torch.randn(3, 8))
    monkeypatch.setenv("FASTGEN_IMPL", "cpp")
    with pytest.raises(UsageError, match="tune measures auto's candidates, but 'cpp' is requested"):
        fastgen.tune(model, torch.randn(3, 8))


def test_nothing_to_choose():
    assert str(fastgen.tune(nn.Linear(2, 3), torch.randn(4, 2))).startswith("nothing to choose")


def test_the_gpus_benchmark_tunes_its_layers(monkeypatch, folder, capsys):
    from benchmarks import gpu_layers

    monkeypatch.setattr(gpu_layers, "LAYERS", [FASTGENS, replace(TORCHS, shapes=TORCHS.shapes | {"x": (1, 4, 5, 6)})])
    monkeypatch.setattr(gpu_layers, "BATCHES", (2, 3))
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, torch=2.0))
    assert [case.shapes["x"][0] for case in gpu_layers.large()] == [2, 1, 3]
    assert gpu_layers.tune("cpu") == []
    (file,) = (folder / "shipped").iterdir()
    assert len(_choices._read(file)) == 9 and "bfloat16 channels_last" in file.read_text()
    assert str(file) in capsys.readouterr().out


def test_measurements_that_run_out_of_memory_are_left_out(monkeypatch, caplog):
    """The other measurements are still made."""
    operands = _candidates._operands

    def too_large(question):
        if question.what == "weight_grad":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return operands(question)

    monkeypatch.setattr(_candidates, "_operands", too_large)
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, torch=2.0))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8))
    assert report.tuned and all(question.startswith("weight_grad") for question in report.left_out)
    assert not any(row.question.startswith("weight_grad") for row in report.tuned)
    assert "tune: no memory for weight_grad conv_transpose2d" in caplog.text


def test_a_gpus_time_is_taken_on_the_stream_of_the_call(monkeypatch):
    """On the tensors' GPU, which need not be the current one."""
    events = []

    def event(enable_timing):
        return SimpleNamespace(
            record=lambda stream=None: events.append(stream), synchronize=lambda: None, elapsed_time=lambda other: 1.5
        )

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    scratch = SimpleNamespace(zero_=lambda: None, is_cuda=True, device="cuda:1")
    assert tuning.milliseconds(lambda: events.append("call"), scratch) == 1.5
    assert events == ["the stream of cuda:1", "call", "the stream of cuda:1"]
