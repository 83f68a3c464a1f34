"""Convolutions by tiles of bfloat16 (AMX): emulated on every processor, and compared with the instructions."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgen import ops
from fastgen.ops import _processor
from fastgen.ops._processor import ALGORITHMS
from fastgen.runtime import Plan
from fastgen.runtime._file import encode
from fastgen.runtime._steps import Convolution, Geometry, Input, Output, Precision, Read
from tests.cases import LARGE, SMALL, TESTED
from tests.ops.test_cases import check_parity
from tests.support.observe import by_id, observe
from tests.support.process import run_python
from tests.support.tolerance import error

pytestmark = pytest.mark.skipif(TESTED != "cpp", reason="the C++ kernels are replaced")

CONVOLUTIONS = [case for case in SMALL if case.op.startswith("conv")]
# The relative L2 error of one layer: two parts keep 16 bits of each factor, three keep all 24.
SPLIT = {"amx_bf16x3": 1e-5, "amx_bf16x6": 1e-6}


@by_id(CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
def test_parity(case, channels_last, poisoned, fastgen_kernels, monkeypatch):
    """Odd sizes, few channels and all kinds of padding."""
    monkeypatch.setenv("FASTGEN_AMX", "emulate")
    assert _processor.amx() == "emulated"
    check_parity(case, torch.bfloat16, channels_last)


@by_id(LARGE)
def test_parity_of_real_layers(case, poisoned, fastgen_kernels, monkeypatch):
    """With two images, because the emulation is slow."""
    monkeypatch.setenv("FASTGEN_AMX", "emulate")
    x = case.shapes["x"]
    few = dataclasses.replace(case, shapes=case.shapes | {"x": (min(2, x[0]), *x[1:])})
    check_parity(few, torch.bfloat16, True)


@by_id([case for case in CONVOLUTIONS if not case.batch_stats])
def test_emulation_equals_the_instructions(case, fastgen_kernels, monkeypatch):
    if _processor.amx() != "instructions":
        pytest.skip("this processor has no AMX, or this process may not use it")
    tensors = case.tensors(torch.bfloat16, True)
    upstream = torch.randn_like(case.call({name: t.clone() for name, t in tensors.items()}, impl="reference"))
    by_instructions = observe(case, tensors, upstream, TESTED)
    monkeypatch.setenv("FASTGEN_AMX", "emulate")
    for name, emulated in observe(case, tensors, upstream, TESTED).items():
        assert emulated.equal(by_instructions[name]), name


@pytest.mark.parametrize("algorithm", ("amx_bf16", *SPLIT))
@pytest.mark.parametrize("emulate", (True, False), ids=("emulated", "instructions"))
@pytest.mark.parametrize(
    ("geometry", "x", "out"),
    (
        (Geometry((3, 3), padding=(1, 1), reflect=True), (40, 9, 11), (36, 9, 11)),
        (Geometry((4, 4), stride=(2, 2), padding=(1, 1), transposed=True), (33, 4, 4), (17, 8, 8)),
        (Geometry((4, 4), stride=(2, 2), padding=(1, 1)), (3, 12, 10), (5, 6, 5)),
    ),
    ids=("3x3", "transposed", "few channels"),
)
def test_split_float32(algorithm, emulate, geometry, x, out, monkeypatch):
    """A plan's convolution in float32 by sums of bfloat16 products, and in bfloat16. Values that are not finite pass on
    as in PyTorch."""
    if not emulate and _processor.amx() != "instructions":
        pytest.skip("this processor has no AMX, or this process may not use it")
    monkeypatch.setenv("FASTGEN_AMX", "emulate" if emulate else "")
    generator = np.random.default_rng(0)
    sizes = (x[0], out[0]) if geometry.transposed else (out[0], x[0])
    weight = generator.standard_normal((*sizes, *geometry.kernel), np.float32)
    chosen = ALGORITHMS.index(algorithm)
    steps = [Input([], x, 3), Convolution([Read(0, x)], out, geometry, weight, algorithm=(chosen, chosen)),
             Output([Read(1, out)], out, 3)]  # fmt: skip
    precision = Precision.bfloat16 if algorithm == "amx_bf16" else Precision.float32
    plan = Plan(encode(steps, precision=precision))

    def run(value: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tensor, kernel = torch.from_numpy(value).double(), torch.from_numpy(weight).double()
        if geometry.transposed:
            exact = F.conv_transpose2d(tensor, kernel, stride=geometry.stride, padding=geometry.padding)
        else:
            padded = F.pad(tensor, (1, 1, 1, 1), mode="reflect" if geometry.reflect else "constant")
            exact = F.conv2d(padded, kernel, stride=geometry.stride)
        return torch.from_numpy(plan(value)).double(), exact

    for n in (1, 9):
        value = generator.standard_normal((n, *x), np.float32)
        found, exact = run(value)
        assert error(found, exact) < SPLIT.get(algorithm, 1e-2)
        value[0, 0, 0, 0], value[0, 1, 3, 3], value[0, 2, 3, 2], value[-1, 1, 1, 2] = np.inf, np.inf, -np.inf, np.nan
        found, exact = run(value)
        finite = exact.isfinite()
        assert torch.equal(found.isfinite(), finite)
        torch.testing.assert_close(found[~finite], exact[~finite], equal_nan=True)


def test_the_switches_turn_it_off(monkeypatch):
    """FASTGEN_AMX=0 turns all off; FASTGEN_WINOGRAD=0 those that round more than float32 does."""
    x, out = (40, 8, 8), (40, 8, 8)
    weight = np.random.default_rng(0).standard_normal((40, 40, 3, 3), np.float32)
    value = np.random.default_rng(1).standard_normal((2, *x), np.float32)

    def run(algorithm: str) -> np.ndarray:
        chosen = ALGORITHMS.index(algorithm)
        steps = [Input([], x, 3),
                 Convolution([Read(0, x)], out, Geometry((3, 3), padding=(1, 1)), weight, algorithm=(chosen, chosen)),
                 Output([Read(1, out)], out, 3)]  # fmt: skip
        return Plan(encode(steps))(value)

    monkeypatch.setenv("FASTGEN_AMX", "emulate")
    split = run("amx_bf16x3")
    monkeypatch.setenv("FASTGEN_WINOGRAD", "0")
    direct = run("direct")
    assert not np.array_equal(split, direct) and np.array_equal(run("amx_bf16x3"), direct)
    monkeypatch.setenv("FASTGEN_AMX", "0")
    assert _processor.amx() == "none" and "AMX: not used" in ops.info()
    monkeypatch.delenv("FASTGEN_WINOGRAD")
    assert not np.array_equal(run("amx_bf16x3"), split)


@pytest.mark.parametrize("isa", ("avx2", "baseline"))
def test_emulation_on_older_processors(isa):
    code = """
import torch
from fastgen import ops
x, weight = torch.randn(3, 40, 7, 5).bfloat16(), torch.randn(40, 24, 4, 4).bfloat16()
out = ops.conv_transpose2d_norm_act(x, weight, stride=2, padding=1, impl="cpp")
exact = torch.nn.functional.conv_transpose2d(x.double(), weight.double(), stride=2, padding=1)
print(((out - exact).norm() / exact.norm()).item() < 3e-3, torch.ops.fastgen.amx())
"""
    settings = {"FASTGEN_CPU_ISA": isa, "FASTGEN_AMX": "emulate"}
    assert run_python(code, environment=settings).stdout.split() == ["True", "1"]


def test_a_forked_child_multiplies_tiles():
    code = """
import os, torch
from fastgen import ops
torch.set_num_threads(1)
x, weight = torch.randn(2, 32, 8, 8).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
out = ops.conv2d_norm_act(x, weight, padding=1, impl="cpp")
child = os.fork()
if not child:
    os._exit(0 if ops.conv2d_norm_act(x, weight, padding=1, impl="cpp").equal(out) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, environment={"FASTGEN_AMX": os.environ.get("FASTGEN_AMX", "")}).stdout.strip() == "0"
