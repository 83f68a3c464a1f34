"""The choice of an implementation, and the errors when one is missing."""

import importlib.util

import pytest
import torch

from fastgen import ops
from fastgen._build import cuda
from fastgen._build.library import Status
from fastgen.errors import UsageError
from fastgen.ops import _tiers
from tests.cases import CASES
from tests.support.process import run_python

X = torch.ones(2, 3, 4, 4)


def calls(impl: str) -> int:
    return ops.implementations_used().get("norm_act", {}).get(impl, 0)


def test_order_of_choice(monkeypatch):
    """The argument, then use_impl, then FASTGEN_IMPL, then auto."""
    monkeypatch.setenv("FASTGEN_IMPL", "reference")
    for impl, override, runs in (
        ("auto", "auto", "reference"),
        ("auto", "cpp", "cpp"),
        ("reference", "cpp", "reference"),
    ):
        before = calls(runs)
        with ops.use_impl(override):
            ops.norm_act(X, norm="none", impl=impl)
        assert calls(runs) == before + 1
    monkeypatch.delenv("FASTGEN_IMPL")
    before = calls("cpp")
    ops.norm_act(X, norm="none")
    assert calls("cpp") == before + 1


def test_use_impl_ends_with_its_context():
    with pytest.raises(KeyError), ops.use_impl("reference"):
        raise KeyError
    before = calls("cpp")
    ops.norm_act(X, norm="none")
    assert calls("cpp") == before + 1


def test_missing_kernel_is_an_error_when_asked_for():
    for tier in ("cuda", "triton"):
        with pytest.raises(
            RuntimeError, match=f"impl='{tier}' cannot run norm_act: {tier} kernels run on a GPU, .* on cpu"
        ):
            ops.norm_act(X, norm="none", impl=tier)


@pytest.mark.parametrize("tier", ("triton", "cuda"))
@pytest.mark.parametrize(
    ("found", "dtype", "reason"),
    [
        ({"find_spec": None}, torch.float32, {"triton": "triton is not installed", "cuda": None}),
        ({"load": "no CUDA toolkit"}, torch.float32, {"triton": None, "cuda": "no CUDA toolkit"}),
        ({"is_built": False}, torch.float32, "built without CUDA"),
        ({"is_available": False}, torch.float32, "no CUDA device or driver"),
        ({"get_device_capability": (7, 5)}, torch.float32, "has compute capability 7.5, but the kernels need 8.0"),
        (
            {"_why_no_driver": "triton cannot use it"},
            torch.float32,
            {"triton": "triton cannot use it", "cuda": None},
        ),
        (
            {"has_code": False},
            torch.float32,
            {"triton": None, "cuda": "not built for cuda:0, whose compute capability is 9.0"},
        ),
        ({}, torch.float64, "not float64"),
        ({}, torch.bfloat16, None),
    ],
    ids=lambda v: next(iter(v), "all there") if isinstance(v, dict) else str(v),
)
def test_each_reason_why_a_tier_cannot_run(tier, found, dtype, reason, monkeypatch):
    """Each requirement of the GPU tiers, missing alone."""
    there = {
        "find_spec": True,
        "is_built": True,
        "is_available": True,
        "get_device_capability": (9, 0),
        "load": None,
        "_why_no_driver": None,
        "has_code": True,
    }
    there |= found
    has_code = there.pop("has_code")
    monkeypatch.setattr(_tiers, "_cuda_op", lambda op: {"has_code": lambda index: has_code}[op])
    owners = (importlib.util, torch.backends.cuda, torch.cuda, torch.cuda, cuda, _tiers.triton)
    reason = reason[tier] if isinstance(reason, dict) else reason
    for (name, value), owner in zip(there.items(), owners, strict=True):
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    _tiers._gpu_unavailable.cache_clear()
    try:
        found = _tiers.why_not("norm_act", tier, "cuda:0", dtype)
    finally:
        _tiers._gpu_unavailable.cache_clear()
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_driver_or_a_compiler_for_it_says_so():
    pytest.importorskip("triton", reason="triton is not installed")
    assert "triton cannot use the GPU's driver: " in (_tiers.triton._why_no_driver() or "")


def test_cpp_on_another_device():
    with pytest.raises(
        RuntimeError, match="impl='cpp' cannot run norm_act: cpp kernels run on the CPU, but the input is on meta"
    ):
        ops.norm_act(X.to("meta"), norm="none", impl="cpp")
    assert ops.norm_act(X.to("meta"), norm="none").device.type == "meta"


def test_unknown_names(monkeypatch):
    with pytest.raises(UsageError, match="impl: unknown implementation 'cudnn': choose from: auto, reference, cpp"):
        ops.norm_act(X, norm="none", impl="cudnn")
    with pytest.raises(UsageError, match="use_impl: unknown"), ops.use_impl("fast"):
        pass
    monkeypatch.setenv("FASTGEN_IMPL", "turbo")
    with pytest.raises(UsageError, match="FASTGEN_IMPL: unknown implementation 'turbo'"):
        ops.norm_act(X, norm="none")


def test_threads_that_call_first_together():
    """The CUDA ops are defined once, although nn.DataParallel runs its replicas in threads."""
    code = """
import sys, threading
from fastgen import ops
from fastgen.ops import _tiers
sys.setswitchinterval(1e-6)
start = threading.Barrier(8)
def call():
    start.wait()
    try: _tiers.nvcc.kernel("norm_act")
    except NotImplementedError: pass  # it has no kernel here
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    assert "Error" not in run_python(code).stderr


def test_info_builds_nothing(monkeypatch):
    """Not even if there is a GPU for which the CUDA kernels are not built yet."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cuda, "load", lambda: pytest.fail("built"))
    monkeypatch.setattr(cuda, "status", lambda: Status(False, "not built yet", None, None, None))
    assert "not built yet" in ops.info()


def test_info_names_every_op_and_each_reason():
    text = ops.info()
    for case in CASES:
        assert case.op in text
    assert "cuda kernels run on a GPU" in text or "built without CUDA" in text
    assert "Triton: " in text and torch.__version__ in text


WITHOUT_NATIVE = """
import logging
import torch
from fastgen.ops import _dispatch
from tests.cases import SMALL
from tests.support.observe import observe
from tests.support.tolerance import FLOAT64

messages = []
logging.getLogger("fastgen").addFilter(lambda record: messages.append(record.getMessage()))
choose = _dispatch._choose
for case in SMALL:
    tensors = case.tensors(torch.float64, channels_last=True)
    upstream = torch.ones_like(case.call({n: t.clone() for n, t in tensors.items()}, impl="reference"))
    expected = observe(case, tensors, upstream, "reference")
    torch.testing.assert_close(observe(case, tensors, upstream, "auto"), expected)
    _dispatch._choose = lambda *_: "cpp"  # on to the registered op, whose default kernel runs
    torch.testing.assert_close(observe(case, tensors, upstream, "auto"), expected, **FLOAT64)
    _dispatch._choose = choose
assert len(messages) == 1 and "FASTGEN_BUILD=0" in messages[0], messages
"""


def test_without_the_native_library(tmp_path):
    """Auto falls back to the reference and says so once; the registered ops run their default kernels."""
    run_python(WITHOUT_NATIVE, environment={"FASTGEN_BUILD": "0", "FASTGEN_CACHE_DIR": str(tmp_path)})


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_other_instruction_sets(isa):
    """FASTGEN_CPU_ISA lowers the instruction set, and every kernel is right with each."""
    code = """
import os
from tests.ops.test_cases import SMALL, UNIT_ROUNDOFF, check_parity
for winograd in (False, True):
    os.environ["FASTGEN_WINOGRAD"] = "always" if winograd else "0"
    for case in SMALL:
        for dtype in UNIT_ROUNDOFF:
            for channels_last in (False, True):
                check_parity(case, dtype, channels_last, winograd)
"""
    run_python(code, environment={"FASTGEN_CPU_ISA": isa})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FASTGEN_IMPL", "nothing", "FASTGEN_IMPL: unknown implementation 'nothing'"),
        ("FASTGEN_CPU_ISA", "sse", "FASTGEN_CPU_ISA must be one of baseline, avx2, avx512, got 'sse'"),
        ("FASTGEN_AMX", "1", "FASTGEN_AMX must be one of 0, emulate, got '1'"),
        ("FASTGEN_WINOGRAD", "maybe", "FASTGEN_WINOGRAD must be one of 0, always, got 'maybe'"),
        ("FASTGEN_THREADS", "-3", "FASTGEN_THREADS must be a positive integer, got '-3'"),
    ],
)
def test_invalid_environment_variables_are_errors(name, value, says):
    """It is an error, even in a fused model, which otherwise runs its modules where an op refuses."""
    code = """
import torch
from torch import nn
import fastgen
from fastgen.errors import UsageError
model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU())
for call in (lambda: fastgen.fuse(model)(torch.zeros(8, 64, 32, 32)), fastgen.info):
    try:
        call()
    except UsageError as error:
        print(error)
"""
    if _tiers.ON_CPU:
        pytest.skip("no C++ kernels are loaded")
    done = run_python(code, environment={name: value})
    assert [line.startswith(says) for line in done.stdout.splitlines()] == [True, True], done.stdout
