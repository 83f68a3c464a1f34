"""Measured choices: which file takes precedence, and which entries cannot be used."""

import json
import logging

import pytest
import torch

from fastgen import ops
from fastgen.ops import _autograd, _choices, _convolution_grad
from fastgen.ops._tiers import ON_CPU
from tests.ops.measured import FASTGENS, TORCHS, forward, keep, key, recorded_choices, run
from tests.support.process import run_ranks
from tests.support.tolerance import error

if ON_CPU:
    pytest.skip("nothing is measured of kernels in another's place", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("case", (FASTGENS, TORCHS), ids=lambda case: case.id)
@pytest.mark.parametrize("forward", ("cpp", "torch"))
@pytest.mark.parametrize("backward", ("cpp", "torch"))
def test_the_table_decides(case, forward, backward, monkeypatch):
    """The table overrules the rules for forward and both gradients, and the results are right."""
    exact, _ = run(case, "reference")
    questions = recorded_choices(case)
    assert {q.what for q in questions} == {"forward", "input_grad", "weight_grad"}
    keep(questions, backward)
    keep([question for question in questions if question.what == "forward"], forward)
    called, by_aten = [], []
    call, grads = _autograd.call, _convolution_grad.aten_gradients
    monkeypatch.setattr(_autograd, "call", lambda op, *inputs: called.append(op) or call(op, *inputs))
    monkeypatch.setattr(_convolution_grad, "aten_gradients", lambda *args: by_aten.append(args[-1]) or grads(*args))
    seen, ran = run(case)
    assert ran == {"cpp" if forward == "cpp" else "unfused"}
    assert ("convolution_weight_grad" in called) == (backward == "cpp")
    # If PyTorch computes everything, its own gradients run.
    assert by_aten == ([(True, True)] if (forward, backward) == ("cpp", "torch") else [])
    for name in exact:
        assert error(seen[name], exact[name].double()) < 1e-5, name


def test_what_takes_precedence_over_the_table(monkeypatch):
    keep(recorded_choices(FASTGENS), "torch")
    assert run(FASTGENS)[1] == {"unfused"}
    assert run(FASTGENS, "cpp")[1] == {"cpp"}
    with ops.use_impl("cpp"):
        assert run(FASTGENS)[1] == {"cpp"}
    monkeypatch.setenv("FASTGEN_IMPL", "cpp")
    assert run(FASTGENS)[1] == {"cpp"}
    monkeypatch.delenv("FASTGEN_IMPL")
    monkeypatch.setenv("FASTGEN_CHOICES", "0")
    _choices.forget()
    assert run(FASTGENS)[1] == {"cpp"}


def test_the_users_choices_take_precedence_over_shipped_ones(folder):
    assert forward() == "cpp"
    _choices.save(_choices.chip("cpu"), {key(): ("torch", {}), key("other"): ("cpp", {})}, folder / "shipped")
    assert forward() == "torch"  # memoized choices are discarded
    file = _choices.save(_choices.chip("cpu"), {key(): ("cpp", {})})
    assert file.is_relative_to(folder / "cache") and forward() == "cpp"
    file.unlink()
    _choices.forget()
    assert forward() == "torch"


def test_choices_that_cannot_run_here_are_ignored():
    for implementation in ("triton 64x64x64x4x3", "cuda"):
        _choices.save(_choices.chip("cpu"), {key(): (implementation, {})})
        assert forward() == "cpp"


def test_a_file_is_readable_and_keeps_what_was_measured():
    file = _choices.save(_choices.chip("cpu"), {"b": ("cpp", {"cpp": 1.23456, "torch": 2.0}), "a": ("torch", {})})
    _choices.save(_choices.chip("cpu"), {"c": ("torch", {})})
    first, *lines, last = file.read_text().splitlines()
    assert (first, last) == ('{"format": 2, "choices": {', "}}")
    assert [line.split('"')[1] for line in lines] == ["a", "b", "c"]
    assert json.loads(file.read_text())["choices"]["b"] == {
        "chosen": "cpp", "ms": {"cpp": 1.235, "torch": 2.0}, "torch": torch.__version__
    }  # fmt: skip
    assert key() == (
        "forward conv_transpose2d 2x16x8x8 by 16x16x4x4 float32 stride 2x2 padding 1x1 output_padding 0x0 "
        "dilation 1x1 groups 1"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ('{"format": 2, "choices": {"a', "Unterminated string"),
        ("\xff", "Expecting value"),
        ("[1]", "its format is None, but this fastgen reads format 2"),
        ('{"format": 1, "choices": {}}', "its format is 1"),
        ('{"format": 2}', "it contains no choices"),
        ('{"format": 2, "choices": {"a": 3}}', "names an unknown implementation None for a"),
        ('{"format": 2, "choices": {"a": {"chosen": "cudnn"}}}', "an unknown implementation 'cudnn'"),
        ("[" * 100_000, ""),
    ],
)
def test_a_file_that_cannot_be_used(text, says, folder, caplog):
    """One warning names it, the rules decide, and the next write moves it aside."""
    file = folder / "cache" / "choices" / f"{_choices.chip('cpu')}.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "fastgen"):
        for _ in range(2):
            assert forward() == "cpp"
            _choices.forget()
    assert len(caplog.messages) == 1 and str(file) in caplog.text and says in caplog.text
    keep([key()], "torch")
    assert forward() == "torch" and file.with_name(f"{file.name}.old").read_text() == text


def test_choices_are_per_chip(monkeypatch):
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


def test_two_processes_write_concurrently(folder):
    run_ranks(WRITER, 2)
    file = folder / "cache" / "choices" / "chip.json"
    assert set(_choices._read(file)) == {f"{writer} {i}" for writer in range(2) for i in range(15)}
    assert [other.name for other in file.parent.iterdir()] == [file.name]
