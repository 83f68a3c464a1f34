"""The modules that replace runs of PyTorch's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgen
from fastgen import ops
from fastgen.nn import Conv2dNormAct, ConvTranspose2dNormAct, NormAct
from tests.support.tolerance import UNIT_ROUNDOFF, units

GRADIENTS = units(torch.float32, 1024, 1024)  # values up to 100: sums over all pixels whose terms cancel


def layers(module: nn.Sequential) -> nn.Sequential:
    """A torch.nn.Sequential of copies of the children."""
    return nn.Sequential(*(copy.deepcopy(child) for child in module))


@pytest.mark.usefixtures("fused_when_small")
@pytest.mark.parametrize("memory_efficient", (False, True))
@pytest.mark.parametrize("norm", ("batch", "instance", "group", None))
@pytest.mark.parametrize("cls", (Conv2dNormAct, ConvTranspose2dNormAct))
def test_is_the_sequential_of_its_children(cls, norm, memory_efficient):
    groups = {"num_groups": 2} if norm == "group" else {}
    module = cls(
        4, 6, 4, 2, 1, bias=norm is None, norm=norm, activation="relu", memory_efficient=memory_efficient, **groups
    )
    plain = layers(module)
    assert module.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 4, 8, 8)
    for one in (module, plain):
        one(x).square().sum().backward()
    for actual, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, **GRADIENTS)
    again = pickle.loads(pickle.dumps(copy.deepcopy(module))).eval()
    torch.testing.assert_close(again(x), plain.eval()(x))


@pytest.mark.parametrize(
    "options", ({"norm": "batch"}, {"norm": "instance"}, {"norm": "group", "num_groups": 2}), ids=str
)
def test_norm_act(options):
    module = NormAct(6, **options, activation="tanh")
    x = torch.randn(4, 6, 3, 3)
    torch.testing.assert_close(module(x), layers(module)(x))
    with pytest.raises(ValueError, match="num_groups must be given"):
        NormAct(6, norm="batch", num_groups=2)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"norm": "layer"}, "norm must be"),
        ({"norm": "group"}, "num_groups must be given"),
        ({"num_groups": 2}, "num_groups must be given"),
        ({"activation": "gelu"}, "activation must be"),
    ),
)
def test_impossible_arguments_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        Conv2dNormAct(4, 6, 3, **options)


@pytest.mark.usefixtures("fused_when_small")
def test_reflection_padding():
    module = Conv2dNormAct(4, 6, 3, padding=1, padding_mode="reflect", norm="instance")
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(module(x), layers(module)(x))


@pytest.mark.usefixtures("fused_when_small")
def test_fuse_memory_efficient_changes_no_bit():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)) for _ in range(4)]
    model, x = nn.Sequential(*blocks), torch.randn(2, 8, 16, 16)
    found = []
    for memory_efficient in (False, True):
        fused = fastgen.fuse(model, memory_efficient=memory_efficient)
        out = fused(x)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in fused.parameters()), *fused.buffers()])
    for economical, plain in zip(*found, strict=True):
        assert torch.equal(economical, plain)


def calls(op: str) -> tuple[int, int]:
    """The numbers of calls so far that PyTorch and fastgen computed."""
    used = ops.implementations_used().get(op, {})
    return used.get("modules", 0), sum(used.values()) - used.get("modules", 0)


CANCELLING = 128 * UNIT_ROUNDOFF[torch.float32]  # of the largest: both norms' gradients are sums that cancel


@pytest.mark.parametrize("kind", (nn.Conv2d, nn.ConvTranspose2d))
def test_pytorch_computes_small_convolutions(kind):
    """They give PyTorch's bits; the op computes larger ones, and requested implementations."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(kind(4, 6, 4, 2, 1, bias=False))
    plain = nn.Sequential(layer, nn.BatchNorm2d(6, momentum=None), nn.LeakyReLU(0.2, inplace=True))
    fused = fastgen.fuse(copy.deepcopy(plain))
    x = torch.randn(3, 4, 8, 8)
    op = "conv2d_norm_act" if kind is nn.Conv2d else "conv_transpose2d_norm_act"
    by_torch, by_fastgen = calls(op)
    for one in (fused, plain):
        one(x).square().sum().backward()
    assert calls(op) == (by_torch + 1, by_fastgen)
    for actual, expected in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=0, atol=CANCELLING * expected.grad.abs().max().item()
        )

    with fastgen.use_impl("cpp"):
        fused(x)
    assert calls(op) == (by_torch + 1, by_fastgen + 1)
    many = torch.randn(3, 4, 400, 400)
    with torch.no_grad():
        fused(many)
    assert calls(op) == (by_torch + 1, by_fastgen + 2)


@pytest.mark.parametrize("labels", ([0], [[0], [1]], 0))
def test_labels_of_a_conditional_norm_do_not_broadcast(labels):
    norm = fastgen.nn.ConditionalBatchNorm2d(4, 3)
    with pytest.raises(ValueError, match=r"labels must be one per image, of shape \(2,\), got"):
        norm(torch.randn(2, 4, 5, 5), torch.tensor(labels))
