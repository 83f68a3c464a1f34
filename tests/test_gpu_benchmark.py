"""The parts of `make gpu` that run without a GPU: rows of whole networks, parity with the CPU kernels, continuing a
run."""

import contextlib
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from benchmarks import gpu_parity, gpu_session
from benchmarks.gpu_floors import LAYERS
from benchmarks.gpu_networks import networks
from benchmarks.traffic import of_launch
from fastgen.ops import _tiers
from tests.support.process import run_python

if _tiers.ON_CPU:
    pytest.skip("whole networks: too slow for kernels in another's place", allow_module_level=True)


def clock(call):
    call()
    return 1.5


def test_rows_of_networks(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: None)
    document = gpu_session.started(Path("none"), {"date": "today"})
    gpu_session.add_rows(document, networks(clock, "cpu", 2))
    assert len(document["rows"]) == 7 and all(row["correct"] for row in document["rows"])
    lines = gpu_session.table(document | {"tiers": {}})
    assert "| DCGAN-64 training step | 2 | bfloat16 | step | fastgen auto | 1.500 |" in lines


ROW = {"case": "a layer", "batch": 1, "dtype": "torch.bfloat16", "what": "forward", "peer": "eager"}


def rows(ms, fails=False):
    yield ROW | {"ms": ms}
    if fails:
        raise RuntimeError("out of memory")
    yield ROW | {"peer": "fastgen", "ms": ms}


def test_a_run_continues_where_the_last_one_ended(tmp_path):
    """Rows that failed or were left out for lack of time are measured in the next run, no row is written twice, and
    another commit starts over."""
    file, about = tmp_path / "gpu.json", {"commit": "a", "date": "today"}

    def keep(document):
        file.write_text(json.dumps(document))

    def run(about, seconds, **stages):
        document = gpu_session.started(file, about)
        made = ((name, partial(gpu_session.add_rows, rows=rows)) for name, rows in stages.items())
        gpu_session.run(document, made, time.monotonic() + seconds, keep)
        return json.loads(file.read_text())

    first = run(about, 60, layers=rows(1, fails=True))
    assert first["failed"] == ["layers: RuntimeError: out of memory"] and first["done"] == []
    assert [row["ms"] for row in first["rows"]] == [1]
    assert run(about, -1, layers=rows(2))["left_out"] == ["layers"]
    later = run(about | {"date": "tomorrow"}, 60, layers=rows(2))
    assert [row["ms"] for row in later["rows"]] == [2, 2] and later["failed"] == later["left_out"] == []
    assert run(about, 60, layers=rows(3))["rows"] == later["rows"]
    assert run({"commit": "b", "date": "today"}, -1)["rows"] == []
    for _ in range(2):
        assert [row["ms"] for row in run({"commit": "unknown", "date": "today"}, 60, layers=rows(4))["rows"]] == [4, 4]
        assert run({"commit": "unknown", "date": "today"}, -1)["rows"] == []


def test_a_stage_that_outlasts_the_time_keeps_its_rows():
    """Even though a peer's failures are caught where it is measured."""

    def endless():
        yield ROW | {"ms": 1}
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with contextlib.suppress(Exception):
            time.sleep(60)
        yield ROW | {"ms": 2}

    before, kept = signal.signal(signal.SIGALRM, gpu_session.out_of_time), []
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        stages = [("layers", partial(gpu_session.add_rows, rows=endless()))]
        gpu_session.run(
            gpu_session.started(Path("none"), {}), stages, float("inf"), lambda document: kept.append(dict(document))
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [row["ms"] for row in kept[-1]["rows"]] == [1] and kept[-1]["done"] == []
    assert kept[-1]["failed"] == ["layers: OutOfTimeError: time is up"]


def test_parity_names_what_differs(monkeypatch):
    """With the CPU kernels nothing differs, and an injected difference is reported."""
    monkeypatch.setattr(gpu_parity, "tiers", lambda device: {"cpp": None, "cuda": "no GPU"})
    small = gpu_parity.CASES.index(next(case for case in gpu_parity.SMALL if case.op == "norm_act"))
    sampler = gpu_parity.CASES.index(gpu_parity.SPECTRAL[0])
    assert gpu_parity.wrong_of(small, "cpu") == gpu_parity.wrong_of(sampler, "cpu") == []
    monkeypatch.setattr(gpu_parity, "error", lambda actual, expected: 1.0)
    monkeypatch.setattr(gpu_parity.OpCase, "allowed", lambda *_: 0.5)
    assert any(gpu_parity.CASES[small].id in line and "bfloat16" in line for line in gpu_parity.wrong_of(small, "cpu"))
    assert gpu_parity.wrong_of(sampler, "cpu") == [f"cpp: {gpu_parity.CASES[sampler].id}: differs"]


def test_unavailable_facts_of_a_machine_are_unknown():
    assert gpu_session.output_of("echo", "595.1") == "595.1"
    assert gpu_session.output_of("false") == gpu_session.output_of("no-such-program") == "unknown"


def test_the_sanitizer(monkeypatch, tmp_path):
    """It is found in the toolkit, its process allocates each tensor separately, and one that hangs is reported."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_parity.sanitized() == ["compute-sanitizer is not installed: not run"]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho caching $PYTORCH_NO_CUDA_MEMORY_CACHING; exit 3\n")
    tool.chmod(0o755)
    assert gpu_parity.sanitized() == ["memcheck: caching 1", "racecheck: caching 1"]
    tool.write_text("#!/bin/sh\nwhile :; do :; done\n")
    monkeypatch.setattr(gpu_parity, "HANGS", 0.1)
    assert gpu_parity.sanitized() == ["memcheck: no result after 0.1 seconds", "racecheck: no result after 0.1 seconds"]


def test_the_smallest_cases(monkeypatch):
    """Run by the CPU kernels."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        gpu_parity.OpCase, "call", lambda self, x, call=gpu_parity.OpCase.call, **_: call(self, x, impl="cpp")
    )
    monkeypatch.setattr(gpu_parity.ops, "use_impl", lambda _, use=gpu_parity.ops.use_impl: use("cpp"))
    gpu_parity.smallest()


def test_work_of_a_launch():
    """Tiles that fit exactly do the convolution's own products; each byte read or written is counted once."""
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.kernels.test_compiled import convolution

    launch, *_ = convolution(64, 256, 8, 128, 4, torch.bfloat16, training=False)
    found = of_launch(launch)
    assert found.flops == 2 * 64 * 16 * 16 * 128 * 256 * 4
    assert found.bytes == 2 * (64 * 256 * 8 * 8 + 256 * 128 * 16 + 64 * 128 * 16 * 16) + 4 * 4 * 128


def test_floors_as_launched():
    """The floor from the launches is at least the floor from the shapes, but not many times as high."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = "from benchmarks import gpu_floors; gpu_floors.floors()"
    done = run_python(program, environment={"TRITON_INTERPRET": "1"})
    _, _, *lines = done.stdout.splitlines()
    assert len(lines) == len(LAYERS)
    for line in lines:
        shape, launched, *both = map(float, line.split(" | ")[1:5])
        assert shape <= launched <= 5 * shape and both[0] <= both[1] <= 5 * both[0], line


def test_a_case_that_dies_or_hangs_is_reported(monkeypatch):
    late = float("inf")
    monkeypatch.setattr(gpu_parity, "HANGS", 0.01)
    assert gpu_parity.case_apart(0, late) == [f"{gpu_parity.CASES[0].id}: no result after 0.01 seconds"]
    monkeypatch.setattr(gpu_parity, "HANGS", 60)
    monkeypatch.setattr(gpu_parity.sys, "executable", "false")
    assert gpu_parity.case_apart(0, late) == [f"{gpu_parity.CASES[0].id}: "]
    assert gpu_parity.case_apart(0, 0.0) == [f"{gpu_parity.CASES[0].id}: not checked for lack of time"]
