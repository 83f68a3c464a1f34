"""A fused model goes through torch.compile, torch.export, torch.fx and DistributedDataParallel."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fastgen
from tests.inference.layers import ConvNormAct
from tests.inference.parity import FLOAT32, assert_close, assert_same_state
from tests.inference.patterns import OneActivationForTwoRuns
from tests.support.networks import GBlock, unet

pytestmark = pytest.mark.usefixtures("fused_when_small")

MODELS = {
    "attributes": OneActivationForTwoRuns,
    "subclass": lambda: nn.Sequential(ConvNormAct(4, nn.SiLU()), nn.ConvTranspose2d(4, 4, 1), nn.Tanh()),
    "block": lambda: GBlock(4, 4),
    "unet": lambda: nn.Sequential(nn.Conv2d(4, 3, 1), unet()),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """The fused model, the plain one, and an input."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    return fastgen.fuse(model), model, torch.rand(2, 4, 32, 32) * 2 - 1


@pytest.mark.parametrize("training", [True, False])
def test_compile(pair, training):
    fused, plain, x = pair
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    output, expected = compiled(x), plain.train(training)(x)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert_close(output, expected, FLOAT32, "output")
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, FLOAT32, name)
    assert_same_state(fused, plain, FLOAT32)


@pytest.mark.parametrize("strict", [True, False])
def test_export(pair, strict):
    fused, plain, x = pair
    program = torch.export.export(fused.eval(), (x,), strict=strict)
    assert dict(program.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert_close(program.module()(x), plain.eval()(x), FLOAT32, "output")


def test_distributed_data_parallel(pair, tmp_path):
    fused, plain, x = pair
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused)
        wrapped(x).square().mean().backward()
        plain(x).square().mean().backward()
        for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert_close(p.grad, q.grad, FLOAT32, name)
        assert_same_state(fused, plain, FLOAT32)
    finally:
        torch.distributed.destroy_process_group()


def test_symbolic_trace_by_the_user(pair):
    fused, plain, x = pair
    assert_close(torch.fx.symbolic_trace(fused)(x), plain(x), FLOAT32, "output")


COMPILED_LATER = """
import math
import torch
import torch.utils.checkpoint
from torch import nn
import fastgen

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.act(self.conv(x)), x, use_reentrant=False)

fastgen.fuse(Net())
assert torch.compile(lambda x: x * math.prod((2, 3)), fullgraph=True, backend="eager")(torch.ones(1)) == 6
"""


def test_fuse_does_not_break_later_graphs():
    """torch.fx replaces functions of `math` while it traces, so torch._dynamo must not be imported during a trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED_LATER], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
