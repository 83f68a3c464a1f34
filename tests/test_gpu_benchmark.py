"""What of `make gpu` runs without a GPU: its rows of whole networks, and that a failure leaves the other rows."""

import pytest
import torch
from torch import nn

from benchmarks import gpu
from fastgen.ops import _dispatch

if _dispatch.INTERPRETED or _dispatch.CUDA_ON_CPU:
    pytest.skip("whole networks: too slow for kernels in another's place", allow_module_level=True)


def clock(call):
    call()
    return 1.5


def test_rows_of_networks(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: None)
    failed: list[str] = []
    rows = gpu.all_of(gpu.networks(clock, "cpu", 2), failed)
    assert failed == [] and len(rows) == 7 and all(row["correct"] for row in rows)
    document = {name: [] for name in ("wrong", "sanitizer", "left_out")}
    said = gpu.table(document | {"environment": {}, "tiers": {}, "failed": failed, "rows": rows})
    assert "| DCGAN-64 training step | 2 | bfloat16 | step | fastgen auto | 1.500 |" in said


def test_what_fails_is_said():
    def rows():
        yield {"case": "a layer", "peer": "eager"}
        raise RuntimeError("out of memory")

    failed: list[str] = []
    assert gpu.all_of(rows(), failed) == [{"case": "a layer", "peer": "eager"}]
    assert failed == ["after a layer, eager: RuntimeError: out of memory"]
