"""Batch statistics over several processes: each rank's part of a batch gives what the whole batch gives in one
process."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen.nn
from fastgen import ops
from tests.support.process import run_ranks
from tests.support.tolerance import BFLOAT16

CASES = {
    "convolution": lambda: (nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)),
    "strided": lambda: (nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6, momentum=None), nn.Tanh()),
    "norm": lambda: (nn.BatchNorm2d(4, affine=False), nn.SiLU()),
    "untracked": lambda: (nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
}
SAMPLES = (3, 1)  # per rank
PARALLEL = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
import fastgen
from tests.nn.test_synchronized import CASES, SAMPLES, steps

rank, file, impl, folder = int(sys.argv[1]), *sys.argv[2:5]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(SAMPLES))
found = {}
with fastgen.ops.use_impl(impl):
    for name, make in CASES.items():
        torch.manual_seed(0)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*make()).double())
        found[name] = steps(fastgen.fuse(model), rank)
torch.save(found, f"{folder}/{rank}")
dist.destroy_process_group()
os._exit(0)  # gloo's threads may abort an interpreter that ends in the usual way
"""


def steps(model, rank=None):
    """Two steps in training, and one in eval, on the whole batch or a rank's part: outputs, gradients, buffers."""
    batch = torch.randn(2, sum(SAMPLES), 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = slice(None) if rank is None else slice(sum(SAMPLES[:rank]), sum(SAMPLES[: rank + 1]))
    xs = [x[part].requires_grad_() for x in batch]
    outs = [model(x) for x in xs]
    sum(y.pow(3).sum() for y in outs).backward()
    if list(model.buffers()):  # otherwise eval uses each rank's statistics, as in PyTorch
        outs.append(model.eval()(xs[0]))
    of_inputs, of_parameters = [x.grad for x in xs], [p.grad for p in model.parameters()]
    return {"outs": outs, "inputs": of_inputs, "parameters": of_parameters, "buffers": list(model.buffers())}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("impl", ("cpp", "reference"))
def test_as_one_batch_in_one_process(tmp_path, impl):
    run_ranks(PARALLEL, len(SAMPLES), tmp_path / "store", impl, tmp_path)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(len(SAMPLES))]
    for name, make in CASES.items():
        torch.manual_seed(0)
        whole, parts = steps(nn.Sequential(*make()).double()), [rank[name] for rank in ranks]
        for kind in ("outs", "inputs"):
            torch.testing.assert_close(
                [torch.cat(of) for of in zip(*(p[kind] for p in parts), strict=True)], whole[kind]
            )
        summed = [sum(of) for of in zip(*(p["parameters"] for p in parts), strict=True)]
        torch.testing.assert_close(summed, whole["parameters"])
        for part in parts:
            torch.testing.assert_close(part["buffers"], whole["buffers"])


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_a_group_of_one(alone):
    """The op with a residual, in bfloat16 and on an empty batch; a module does not synchronize with itself."""
    x, weight, bias = torch.randn(4, 6, 5, 5), torch.rand(6), torch.randn(6)
    options = {
        "norm": "batch",
        "norm_weight": weight,
        "norm_bias": bias,
        "training": True,
        "residual": x * 2,
        "activation": "relu",
    }
    expected = ops.norm_act(x, **options)
    torch.testing.assert_close(ops.norm_act(x, **options, process_group=alone), expected)
    options["residual"] = options["residual"].bfloat16()
    half = ops.norm_act(x.bfloat16(), **options, process_group=alone)
    torch.testing.assert_close(half.float(), expected, **BFLOAT16)
    assert ops.norm_act(x[:0], norm="batch", training=True, process_group=alone).shape == (0, 6, 5, 5)
    layer = nn.SyncBatchNorm(6)
    model, plain = fastgen.nn.Sequential(layer, nn.ReLU()), nn.BatchNorm2d(6)
    torch.testing.assert_close(model(x), F.relu(plain(x)))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    with pytest.raises(ValueError, match="process_group needs norm='batch'"):
        ops.norm_act(x, norm="instance", process_group=alone)
    y = ops.norm_act(x.requires_grad_(), norm="batch", training=True, process_group=alone)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
