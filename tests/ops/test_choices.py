"""Measured choices: which file decides what, what cannot be used, and fastgen.tune, whose clock is replaced here."""

import importlib
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastgen
from fastgen import ops
from fastgen._build import native
from fastgen.errors import UsageError
from fastgen.ops import _autograd, _choices, _convolution, _dispatch, _processor
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import Like, like
from tests.cases import PROCESSORS, SMALL
from tests.support.observe import observe
from tests.support.process import run_python, run_ranks
from tests.support.tolerance import BFLOAT16, FLOAT32, error

if _dispatch.INTERPRETED or _dispatch.CUDA_ON_CPU:
    pytest.skip("nothing is measured of kernels in another's place", allow_module_level=True)
tuning = importlib.import_module("fastgen.inference.tune")
pytestmark = pytest.mark.usefixtures("fused_when_small")
BY_NAME = {case.id: case for case in SMALL}
# By the rules the forward pass of the first is fastgen's, that of the second PyTorch's.
OWN = replace(BY_NAME["conv_transpose2d_norm_act-dcgan-middle"], shapes={"x": (2, 16, 8, 8), "weight": (16, 16, 4, 4)})
THEIRS = BY_NAME["conv2d_norm_act-eval"]
X = torch.zeros(2, 16, 8, 8)
WEIGHT = torch.zeros(16, 16, 4, 4)
GEOMETRY = Geometry((2, 2), (1, 1), (0, 0), 1, (1, 1))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Caches and shipped files of the test's own, which are read; and one processor's rules."""
    assert native.load() is None  # from the real cache
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_choices, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("FASTGEN_CHOICES")
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS["avx512"])  # whichever is at hand
    _choices.forget()
    yield tmp_path
    _choices.forget()


def run(case, impl="auto"):
    """What a training step computes of a case, and which implementations ran."""
    tensors, upstream = case.tensors(torch.float32), torch.ones(case._output_shape())
    before = ops.implementations_used().get(case.op, {})
    seen = observe(case, tensors, upstream, impl)
    after = ops.implementations_used()[case.op]
    return seen, {name for name, count in after.items() if count > before.get(name, 0)}


def asked(case) -> dict:
    with _choices.recorded() as questions:
        run(case)
    return {question: guess for question, guess in questions.items() if question.device == "cpu"}


def keep(questions, implementation, folder=None):
    return _choices.save(
        _choices.chip("cpu"), {str(q): (implementation, {implementation: 1.0}) for q in questions}, folder
    )


def wins() -> str | None:
    return GEOMETRY.wins(X.shape, like(WEIGHT))


def key(what="forward") -> str:
    return str(_choices.Question(what, GEOMETRY, X.shape, WEIGHT.shape, torch.float32, "cpu", False, False))


@pytest.mark.parametrize("case", (OWN, THEIRS), ids=lambda case: case.id)
@pytest.mark.parametrize("forward", ("cpp", "reference"))
@pytest.mark.parametrize("backward", ("cpp", "reference"))
def test_the_table_decides(case, forward, backward, monkeypatch):
    """Forward and both gradients, whatever the rules say; and the results are right."""
    exact, _ = run(case, "reference")
    questions = asked(case)
    assert {q.what for q in questions} == {"forward", "input_grad", "weight_grad"}
    keep(questions, backward)
    keep([question for question in questions if question.what == "forward"], forward)
    called, by_aten = [], []
    call, grads = _autograd.call, _convolution.aten_gradients
    monkeypatch.setattr(_autograd, "call", lambda op, *inputs: called.append(op) or call(op, *inputs))
    monkeypatch.setattr(_convolution, "aten_gradients", lambda *given: by_aten.append(given[-1]) or grads(*given))
    seen, ran = run(case)
    assert ran == {"cpp" if forward == "cpp" else "composed"}
    assert ("convolution_weight_grad" in called) == (backward == "cpp")
    # Where PyTorch does all of it, by its own gradients.
    assert by_aten == ([(True, True)] if (forward, backward) == ("cpp", "reference") else [])
    for name in exact:
        assert error(seen[name], exact[name].double()) < 1e-5, name


def test_what_goes_before_the_table(monkeypatch):
    keep(asked(OWN), "reference")
    assert run(OWN)[1] == {"composed"}
    assert run(OWN, "cpp")[1] == {"cpp"}
    with ops.use_impl("cpp"):
        assert run(OWN)[1] == {"cpp"}
    monkeypatch.setenv("FASTGEN_IMPL", "cpp")
    assert run(OWN)[1] == {"cpp"}
    monkeypatch.delenv("FASTGEN_IMPL")
    monkeypatch.setenv("FASTGEN_CHOICES", "0")
    _choices.forget()
    assert run(OWN)[1] == {"cpp"}


def test_the_users_choice_goes_before_the_shipped(folder):
    assert wins() == "own"
    _choices.save(_choices.chip("cpu"), {key(): ("reference", {}), key("other"): ("cpp", {})}, folder / "shipped")
    assert wins() is None  # what was remembered is forgotten
    file = _choices.save(_choices.chip("cpu"), {key(): ("cpp", {})})
    assert file.is_relative_to(folder / "cache") and wins() == "cpp"
    file.unlink()
    _choices.forget()
    assert wins() is None


def test_what_cannot_run_here_is_not_taken():
    for implementation in ("triton 64x64x64x4x3", "cuda"):
        _choices.save(_choices.chip("cpu"), {key(): (implementation, {})})
        assert wins() == "own"


def test_a_file_is_readable_and_keeps_what_was_measured():
    file = _choices.save(
        _choices.chip("cpu"), {"b": ("cpp", {"cpp": 1.23456, "reference": 2.0}), "a": ("reference", {})}
    )
    _choices.save(_choices.chip("cpu"), {"c": ("reference", {})})
    first, *lines, last = file.read_text().splitlines()
    assert (first, last) == ('{"format": 1, "choices": {', "}}")
    assert [line.split('"')[1] for line in lines] == ["a", "b", "c"]
    assert json.loads(file.read_text())["choices"]["b"] == {
        "chosen": "cpp", "ms": {"cpp": 1.235, "reference": 2.0}, "torch": torch.__version__
    }  # fmt: skip
    assert key() == (
        "forward conv_transpose2d 2x16x8x8 by 16x16x4x4 float32 stride 2x2 padding 1x1 output_padding 0x0 "
        "dilation 1x1 groups 1"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ('{"format": 1, "choices": {"a', "Unterminated string"),
        ("\xff", "Expecting value"),
        ("[1]", "its format is None, this fastgen reads format 1"),
        ('{"format": 2, "choices": {}}', "its format is 2"),
        ('{"format": 1}', "it holds no choices"),
        ('{"format": 1, "choices": {"a": 3}}', "no implementation None, which it names for a"),
        ('{"format": 1, "choices": {"a": {"chosen": "cudnn"}}}', "no implementation 'cudnn'"),
        ("[" * 100_000, ""),
    ],
)
def test_a_file_that_cannot_be_used(text, says, folder, caplog):
    """One warning that names it; the rules decide; and writing puts it aside."""
    file = folder / "cache" / "choices" / f"{_choices.chip('cpu')}.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "fastgen"):
        for _ in range(2):
            assert wins() == "own"
            _choices.forget()
    assert len(caplog.messages) == 1 and str(file) in caplog.text and says in caplog.text
    keep([key()], "reference")
    assert wins() is None and file.with_name(f"{file.name}.old").read_text() == text


def test_the_chip_is_what_decides(monkeypatch):
    before = _choices.chip("cpu")
    assert before == before.lower() and f"{torch.get_num_threads()}-threads" in before
    monkeypatch.setenv("FASTGEN_CPU_ISA", "baseline")
    assert _choices.chip("cpu") != before
    assert _choices.chip("meta") is None


WRITER = """
import sys
from fastgen.ops import _choices
for i in range(15):
    _choices.save("chip", {f"{sys.argv[1]} {i}": ("cpp", {"cpp": i})})
"""


def test_two_processes_write_at_once(folder):
    run_ranks(WRITER, 2)
    file = folder / "cache" / "choices" / "chip.json"
    assert set(_choices._read(file)) == {f"{writer} {i}" for writer in range(2) for i in range(15)}
    assert [other.name for other in file.parent.iterdir()] == [file.name]


def test_a_compiled_graph_takes_the_choice_for_its_sizes():
    """One for sizes that vary goes by the rules."""
    x, weight = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 4, 4)
    keep([key()], "reference")
    for dynamic, implementation in ((False, "composed"), (True, "cpp")):
        torch._dynamo.reset()
        before = ops.implementations_used().get("conv_transpose2d_norm_act", {}).get(implementation, 0)
        compiled = torch.compile(
            lambda x: ops.conv_transpose2d_norm_act(x, weight, norm="none", activation="relu", stride=2, padding=1),
            fullgraph=True, dynamic=dynamic, backend="aot_eager",
        )  # fmt: skip
        expected = torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1).relu()
        torch.testing.assert_close(compiled(x), expected, **FLOAT32)
        assert ops.implementations_used()["conv_transpose2d_norm_act"][implementation] > before


def test_a_gpus_tiers(monkeypatch):
    """The table's tier and tile reach the launch, unless one is asked for."""
    monkeypatch.setattr(_dispatch, "_why_no_gpu", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")
    kind = Like(WEIGHT.shape, torch.bfloat16, torch.device("cuda:0"), True)
    question = _choices.Question("forward", GEOMETRY, X.shape, *kind[:2], "cuda:0", True, False)
    monkeypatch.setattr(_autograd, "call", lambda op, *args: _dispatch._tier(op, "cuda:0", torch.bfloat16))
    for named in ("cuda", "triton", "triton 64x64x64x4x3", "reference"):
        _choices.save("gpu", {str(question): (named, {})})
        found = GEOMETRY.wins(X.shape, kind)
        assert found == (None if named == "reference" else named)
        chosen = _dispatch._choose("conv2d_norm_act", "auto", "cuda:0", torch.bfloat16, found or "composed", False)
        assert chosen == ("composed" if named == "reference" else named)
        if found is not None:
            assert _dispatch.call("conv2d_norm_act", chosen) == tuple(named.partition(" ")[::2])
        with ops.use_impl("cuda"):
            assert (
                _dispatch._choose("conv2d_norm_act", "cuda", "cuda:0", torch.bfloat16, found or "composed", False)
                == "cuda"
            )
            assert _dispatch.call("conv2d_norm_act", "own") == ("cuda", "")
    assert _dispatch.call("conv2d_norm_act", "own") == ("triton", "")
    monkeypatch.setattr(_dispatch, "_why_no_gpu", lambda tier, *_: None if tier == "triton" else "no nvcc")
    _choices.save("gpu", {str(question): ("cuda", {})})
    assert GEOMETRY.wins(X.shape, kind) == "own"  # transposed, in 16 bits


def test_the_tier_of_an_op_that_memory_bounds(monkeypatch):
    """The measured one runs the op and its gradient, where it can and no other is asked for."""
    from benchmarks import gpu

    monkeypatch.setattr(_dispatch, "_why_no_gpu", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")

    def taken(op):
        chosen = _dispatch._choose(op, "auto", "cuda:0", torch.float32, "own", False)
        return chosen, _dispatch._tier(f"{op}_backward", "cuda:0", torch.float32)[0]

    rows = [
        {"case": case, "what": "forward + backward", "peer": f"fastgen {tier}", "ms": ms, "correct": correct}
        for case, times in (("spectral_norm BigGAN-128 D", (2.0, 1.0)), ("reparameterize_kl", (1.0, 2.0)))
        for tier, ms, correct in (("triton", times[0], True), ("cuda", times[1], case != "reparameterize_kl"))
    ]
    gpu.prefer({"rows": rows})
    assert taken("spectral_norm") == taken("spectral_norm_group") == ("cuda", "cuda")
    assert taken("norm_act") == taken("reparameterize") == ("triton", "triton")
    with ops.use_impl("triton"):
        assert _dispatch._tier("spectral_norm", "cuda:0", torch.float32)[0] == "triton"
    monkeypatch.setattr(_dispatch, "_why_no_gpu", lambda tier, *_: None if tier == "triton" else "no nvcc")
    assert taken("spectral_norm") == ("triton", "triton")


def test_a_gpus_weight_gradient(monkeypatch):
    """cuDNN's where nothing was measured; Triton's is a candidate, and the one that runs where it is asked for."""
    monkeypatch.setattr(_dispatch, "_why_no_gpu", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")
    kind = Like(WEIGHT.shape, torch.bfloat16, torch.device("cuda:0"), True)
    with _choices.recorded() as questions:
        assert GEOMETRY.wins_weight_grad(X.shape, kind, True) is None
    ((question, guess),) = questions.items()
    assert not guess and tuning._candidates.names(question) == ["reference", "triton"]
    _choices.save("gpu", {str(question): ("triton 64x64x64x4x3", {})})
    for impl, expected in (("auto", "triton 64x64x64x4x3"), ("triton", "own"), ("cuda", "own")):
        with ops.use_impl(impl):
            assert (_convolution._asked() or GEOMETRY.wins_weight_grad(X.shape, kind, True)) == expected


@pytest.mark.parametrize("images_last", (False, True))
def test_tiles_of_a_weight_gradient(images_last):
    """Those of the kind of product that the images' memory order allows."""
    pytest.importorskip("triton", reason="triton is not installed")
    question = _choices.Question(
        "weight_grad", GEOMETRY, X.shape, WEIGHT.shape, torch.bfloat16, "cpu", True, images_last
    )
    kinds = _dispatch.kernels("_convolution").TILES
    tiles = [f"triton {tile}" for tile in kinds["16 bits" if images_last else "gathered"]]
    assert tuning._candidates.tiles(question) == tiles


LAUNCHES = """
import torch
from fastgen import ops
from fastgen.ops import _choices, _dispatch
_choices.chip = lambda device: "interpreter"
x, weight = torch.ones(1, 16, 8, 8).requires_grad_(), torch.ones(16, 16, 4, 4).requires_grad_()
def launches():
    with _dispatch.kernels("_common").recorded() as launches:
        out = ops.conv_transpose2d_norm_act(x, weight, norm="none", activation="relu", stride=2, padding=1)
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    return [(of["ROWS"], of["COLUMNS"], of["DEPTH"]) for _, _, of, _ in launches if "COLUMNS" in of]
with _choices.recorded() as questions:
    launches()
torch.backends.cudnn.conv.fp32_precision = "ieee"
for tile in _dispatch.kernels("_convolution").TILES["ieee"]:
    _choices.save("interpreter", {str(q): (f"triton {tile}", {}) for q in questions})
    assert launches() == [tile[:3]] * 3, launches()
    with ops.use_impl("reference"):
        assert launches() == []
_choices.save("interpreter", {str(q): ("cuda", {}) for q in questions})  # cannot run: the rules
assert launches()
"""


def test_a_measured_tile_is_launched():
    """Forward and both gradients."""
    pytest.importorskip("triton", reason="triton is not installed")
    run_python(LAUNCHES, environment={"TRITON_INTERPRET": "1"})


# tune


def clock(**milliseconds):
    """In the place of tuning.milliseconds: what a call is to have taken, by its name."""

    def time_of(call, scratch):
        own = call.func in (
            tuning._candidates._forward,
            tuning._candidates._input_grad,
            tuning._candidates._weight_grad,
        )
        return milliseconds[call.args[-1] if own else "reference"]

    return time_of


def tiny(**options) -> nn.Module:
    return fastgen.create_model("dcgan", image_size=32, channels=1, nz=8, ngf=2, ndf=2, **options)


@pytest.mark.parametrize("faster", ("cpp", "reference"))
def test_tune(faster, monkeypatch, folder):
    times = {"cpp": 2.0, "reference": 2.0} | {faster: 1.0}
    monkeypatch.setattr(tuning, "milliseconds", clock(**times))
    model, z, said = tiny().generator, torch.randn(3, 8), []
    state, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    report = fastgen.tune(model, z, progress=said.append)
    torch.testing.assert_close(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random) and model.training and z.grad is None
    assert len(report.tuned) == len(said) == 12 and not report.left_out  # four layers
    assert {row.chosen for row in report.tuned} == {faster}
    assert all(row.milliseconds == times for row in report.tuned)
    (file,) = report.files
    assert file.is_relative_to(folder / "cache")
    text = str(report).splitlines()
    assert text[0].split() == ["question", "milliseconds", "chosen", "by", "rule"] and str(file) in text[-1]
    with _choices.recorded() as questions:
        model(z.requires_grad_()).sum().backward()
    assert {_choices._measured(False, *q) for q in questions} == {faster}


def test_tune_without_gradients(monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, reference=2.0))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = fastgen.tune(model, torch.randn(2, 3, 8, 8), training=False).tuned
    assert row.question.startswith("forward conv2d 2x3x8x8 by 4x3x3x3 bfloat16 stride")
    assert (row.chosen, row.rule) == ("cpp", "reference")


@pytest.mark.parametrize(("processor", "multiplies"), (("avx2", False), ("amx", True)))
def test_dtypes_that_pytorch_does_not_multiply(processor, multiplies, monkeypatch):
    """There even a small convolution that otherwise PyTorch computes is the op's, and gives the same."""
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS[processor])
    _choices.forget()
    model = fastgen.nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    before = ops.implementations_used().get("conv2d_norm_act", {}).get("cpp", 0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert ops.implementations_used()["conv2d_norm_act"].get("cpp", 0) == before + (not multiplies)
    torch.testing.assert_close(y.float(), expected, **BFLOAT16)
    _choices.forget()


def test_every_candidate_computes_the_same():
    """What is measured is what is asked for."""
    for case in (OWN, THEIRS, BY_NAME["conv2d_norm_act-cyclegan-first"]):
        for question in asked(case):
            found = []
            for name in tuning._candidates.names(question):
                torch.manual_seed(0)
                out = tuning._candidates.calls(question, [name])[name]()
                found.append(next(t for t in (out if isinstance(out, tuple) else (out,)) if t is not None))
            assert len(found) == 2
            torch.testing.assert_close(*found, **FLOAT32)


def test_the_rules_choice_stays_unless_another_is_clearly_faster():
    def fastest(rule, **medians):
        return tuning.fastest({name.replace("_", " "): [ms] * 3 for name, ms in medians.items()}, rule)

    assert fastest("cpp", cpp=1.02, reference=1.0) == "cpp"
    assert fastest("cpp", cpp=1.04, reference=1.0) == "reference"
    assert fastest("reference", reference=2.0, triton=1.01, triton_64=1.0, cuda=1.5) == "triton"
    assert fastest("triton", reference=2.0, triton=1.1, triton_64=1.0) == "triton 64"
    # The median says so, the best round does not.
    assert tuning.fastest({"cpp": [1.0, 8.0, 8.0], "reference": [1.0, 1.0, 1.0]}, "cpp") == "cpp"


def test_the_time_ends(monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, reference=2.0))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8), seconds=1e-9)
    assert report.tuned == () and len(report.left_out) == 12 and report.files == ()
    assert "not measured: forward conv_transpose2d" in str(report)


def test_a_candidate_that_fails_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, reference=2.0))
    monkeypatch.setattr(tuning._candidates, "_weight_grad", lambda *_: torch.ones(2) @ torch.ones(3))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8))
    assert {row.question.split()[0] for row in report.tuned} == {"forward", "input_grad"}
    assert "tune: cpp cannot compute weight_grad conv_transpose2d" in caplog.text


def test_triton_is_tried_with_its_tiles(monkeypatch):
    """Where it is near the fastest."""
    monkeypatch.setattr(_dispatch, "own_kernels", lambda *_: "triton")
    monkeypatch.setattr(tuning._candidates, "names", lambda question: ["reference", "triton"])
    monkeypatch.setattr(tuning._candidates, "tiles", lambda question: ["triton 64x64x64x4x3", "triton 16x64x128x4x3"])
    monkeypatch.setattr(tuning._choices, "chip", lambda device: "gpu")
    for triton, chosen in ((1.4, "triton 16x64x128x4x3"), (1.6, "reference")):
        ms = {"reference": 1.0, "triton": triton, "triton 64x64x64x4x3": 1.2, "triton 16x64x128x4x3": 0.5}
        monkeypatch.setattr(
            tuning, "_times", lambda question, names, deadline, ms=ms: {name: [ms[name]] for name in names}
        )
        report = fastgen.tune(tiny().generator, torch.randn(3, 8))
        assert {row.chosen for row in report.tuned} == {chosen}


def test_what_tune_refuses(monkeypatch):
    model = tiny().generator
    with pytest.raises(
        UsageError, match="example_inputs must hold a tensor, got int: give what the model is called with"
    ):
        fastgen.tune(model, 3)
    with pytest.raises(UsageError, match="seconds must be positive and finite, not 0"):
        fastgen.tune(model, torch.randn(3, 8), seconds=0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastgen.tune(3, torch.randn(3, 8))
    monkeypatch.setenv("FASTGEN_IMPL", "cpp")
    with pytest.raises(UsageError, match="tune measures what auto may choose, and 'cpp' is asked for"):
        fastgen.tune(model, torch.randn(3, 8))


def test_nothing_to_choose():
    assert str(fastgen.tune(nn.Linear(2, 3), torch.randn(4, 2))).startswith("nothing to choose")


def test_the_gpus_benchmark_tunes_its_layers(monkeypatch, folder, capsys):
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "LAYERS", [OWN, replace(THEIRS, shapes=THEIRS.shapes | {"x": (1, 4, 5, 6)})])
    monkeypatch.setattr(gpu, "BATCHES", (2, 3))
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, reference=2.0))
    assert [case.shapes["x"][0] for case in gpu.large()] == [2, 1, 3]
    assert gpu.tune("cpu") == []
    (file,) = (folder / "shipped").iterdir()
    assert len(_choices._read(file)) == 9 and "bfloat16 channels_last" in file.read_text()
    assert str(file) in capsys.readouterr().out


def test_what_memory_does_not_suffice_for_is_left_out(monkeypatch, folder, caplog):
    """The other questions are answered."""
    operands = tuning._candidates._operands

    def too_large(question):
        if question.what == "weight_grad":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return operands(question)

    monkeypatch.setattr(tuning._candidates, "_operands", too_large)
    monkeypatch.setattr(tuning, "milliseconds", clock(cpp=1.0, reference=2.0))
    report = fastgen.tune(tiny().generator, torch.randn(3, 8))
    assert report.tuned and all(question.startswith("weight_grad") for question in report.left_out)
    assert not any(row.question.startswith("weight_grad") for row in report.tuned)
    assert "tune: no memory for weight_grad conv_transpose2d" in caplog.text


def test_a_gpus_time_is_taken_on_the_stream_of_the_call(monkeypatch):
    """Of the tensors' GPU, which need not be the current one."""
    said = []

    def event(enable_timing):
        return SimpleNamespace(
            record=lambda stream=None: said.append(stream), synchronize=lambda: None, elapsed_time=lambda other: 1.5
        )

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    scratch = SimpleNamespace(zero_=lambda: None, is_cuda=True, device="cuda:1")
    assert tuning.milliseconds(lambda: said.append("call"), scratch) == 1.5
    assert said == ["the stream of cuda:1", "call", "the stream of cuda:1"]
