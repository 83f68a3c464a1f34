"""Modules written in many ways, fused: they compute the same, and the report says what fuses and why the rest does
not."""

import logging

import pytest
import torch

import fastgen
from tests.inference.layers import PATTERNS
from tests.inference.parity import FLOAT64, assert_close, assert_same_calls, assert_same_training, tensors
from tests.inference.patterns import CALLS

pytestmark = pytest.mark.usefixtures("fused_when_small")
TEN_STEPS = 10 * FLOAT64  # the differences of the steps add up


@pytest.fixture(params=PATTERNS)
def case(request):
    make, fused, left = PATTERNS[request.param]
    torch.manual_seed(0)
    return make().double(), torch.randn(3, 4, 6, 6, dtype=torch.double), fused, left


def test_outputs_gradients_and_statistics(case):
    model, x, _, _ = case
    assert_same_calls(fastgen.fuse(model), model, x, FLOAT64)


@pytest.mark.parametrize("name", [name for name, calls in CALLS.items() if calls])
def test_other_arguments(name):
    model, x = PATTERNS[name][0]().double(), torch.randn(3, 4, 6, 6, dtype=torch.double)
    fused = fastgen.fuse(model)
    for args, kwargs in CALLS[name]:
        try:
            expected = tensors(model(x, *args, **kwargs))
        except TypeError as error:
            with pytest.raises(TypeError) as raised:
                fused(x, *args, **kwargs)
            assert str(raised.value) == str(error)
            continue
        for found, y in zip(tensors(fused(x, *args, **kwargs)), expected, strict=True):
            assert_close(found, y, FLOAT64, f"called with {args}, {kwargs}")


def test_ten_steps(case):
    model, x, _, _ = case
    assert_same_training(fastgen.fuse(model), model, x, lambda p: torch.optim.SGD(p, 1e-3, 0.9), TEN_STEPS)


def test_report(case, caplog):
    model, _, fused, left = case
    report = fastgen.fusion_report(model)
    assert tuple(run.names for run in report.fusable) == fused and report.fused == ()
    reasons = {entry.name: entry.reason for entry in report.left}
    assert {name: reason for name, reason in left.items() if reason not in reasons.get(name, "")} == {}
    assert not reasons.keys() & {name for run in fused for name in run}
    assert str(report).startswith("fusable" if fused else "nothing to fuse")
    with caplog.at_level(logging.WARNING, "fastgen"):
        after = fastgen.fusion_report(fastgen.fuse(model))
    assert tuple(run.names for run in after.fused) == fused and after.fusable == () and after.left == report.left
    assert ("has nothing to fuse" in caplog.text) == (not fused)


def test_twice_is_once(case):
    model, x, _, _ = case
    once = fastgen.fuse(model)
    twice = fastgen.fuse(once)
    assert fastgen.fusion_report(twice) == fastgen.fusion_report(once)
    assert [type(m) for m in once.modules() if "parametrize" not in type(m).__module__] == [
        type(m) for m in twice.modules() if "parametrize" not in type(m).__module__
    ]
    assert_same_calls(twice, model, x, FLOAT64)
