"""fastgen::convolution_weight_grad called directly: operands in any memory order, split sums, and who computes it."""

import pytest
import torch

from fastgen import ops
from fastgen.ops import _tiers
from fastgen.ops._convolution_grad import aten_gradients
from fastgen.ops._geometry import Geometry
from tests.cases import TESTED
from tests.support.tolerance import UNIT_ROUNDOFF, error

assert _tiers.why_not("conv2d_norm_act", TESTED, "cpu") is None  # loads the library if it is built
# name: geometry, shapes of x and weight
ROWS = {
    "odd": (Geometry((2, 1), (1, 0), None, 1, (1, 1)), (2, 5, 7, 6), (7, 5, 3, 2)),
    "groups": (Geometry((2, 1), (0, 1), None, 2, (2, 3)), (2, 6, 7, 5), (4, 3, 3, 2)),
    "reflect": (Geometry((1, 1), (2, 1), None, 1, (1, 1), True), (1, 3, 5, 6), (4, 3, 5, 3)),
    "many-channels": (Geometry((1, 1), (1, 1), None, 1, (1, 1)), (1, 66, 3, 4), (18, 66, 2, 2)),
    "vectors": (Geometry((2, 2), (1, 1), None, 1, (1, 1)), (2, 32, 4, 6), (16, 32, 2, 2)),
    "one-pixel": (Geometry((1, 1), (0, 0), None, 1, (1, 1)), (5, 32, 1, 1), (16, 32, 1, 1)),
    "to-one-pixel": (Geometry((1, 1), (0, 0), None, 1, (1, 1)), (5, 8, 4, 4), (3, 8, 4, 4)),
    "from-one-pixel": (Geometry((1, 1), (0, 0), (0, 0), 1, (1, 1)), (5, 12, 1, 1), (12, 8, 4, 4)),
    "transposed": (Geometry((2, 2), (1, 1), (0, 1), 1, (1, 1)), (3, 40, 2, 3), (40, 5, 4, 3)),
    "transposed-groups": (Geometry((2, 1), (1, 0), (0, 0), 3, (1, 1)), (2, 6, 4, 5), (6, 2, 3, 2)),
    "transposed-dilation": (Geometry((2, 2), (2, 2), (1, 2), 1, (2, 3)), (2, 3, 5, 4), (3, 4, 2, 3)),
    "gaps": (Geometry((3, 3), (0, 0), (2, 2), 1, (1, 1)), (2, 3, 3, 3), (3, 4, 2, 1)),
    "parts": (Geometry((2, 2), (1, 1), None, 1, (1, 1)), (3, 3, 24, 26), (4, 3, 4, 4)),
}


def operands(name, dtype=torch.float32, last=(False, False, False)):
    """(geometry, grad, x, weight), with each tensor in the given memory order."""
    torch.manual_seed(0)
    geometry, *shapes = ROWS[name]
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in (*shapes, geometry.sizes(*shapes)))
    order = (torch.contiguous_format, torch.channels_last)
    made = (t.contiguous(memory_format=order[i]) for t, i in zip((grad, x, weight), last, strict=True))
    return geometry, *made


def weight_grad(geometry, grad, x, weight):
    return torch.ops.fastgen.convolution_weight_grad(grad, x, weight, *geometry.arguments())


@pytest.fixture
def launched(monkeypatch):
    """The names of the Triton kernels that the op launches."""
    names = []
    if _tiers.INTERPRETED:
        kernels = _tiers.triton.kernels("convolution_weight_grad")
        launch = kernels.launch
        monkeypatch.setattr(kernels, "launch", lambda k, *a, **o: names.append(k.__name__) or launch(k, *a, **o))
    return names


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("last", ((False, False, True), (True, False, False), (True, True, True)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_parity(name, last, dtype, poisoned, launched):
    """The values agree with float64, and the memory order is the weight's."""
    geometry, grad, x, weight = operands(name, dtype, last)
    exact = aten_gradients(geometry, grad.double(), x.double(), weight.double(), (False, True))[1]
    reference = aten_gradients(geometry, grad, x, weight, (False, True))[1]
    found = weight_grad(geometry, grad, x, weight)
    assert found.dtype == dtype and found.stride() == weight.stride()
    assert error(found, exact) <= max(2 * error(reference, exact), 4 * UNIT_ROUNDOFF[dtype])
    if _tiers.INTERPRETED:
        assert launched == ["correlate", *["add"] * (name == "parts")]


def test_the_same_bits():
    found = [weight_grad(*operands("parts")) for _ in range(2)]
    assert torch.equal(*found)


def test_no_images_and_strided_operands():
    geometry, grad, x, weight = operands("odd")
    assert torch.equal(weight_grad(geometry, grad[:0], x[:0], weight), torch.zeros_like(weight))
    one = torch.ones(()).expand_as(grad)
    of_columns = x.transpose(2, 3).contiguous().transpose(2, 3)
    transposed = weight.transpose(0, 1).contiguous().transpose(0, 1)
    found = weight_grad(geometry, one, of_columns, transposed)
    torch.testing.assert_close(found, weight_grad(geometry, one.contiguous(), x, weight))


@pytest.mark.skipif(not _tiers.INTERPRETED, reason="TRITON_INTERPRET=1 lets Triton's kernels run here")
def test_who_computes_it(launched, monkeypatch):
    """Triton's kernel if requested; else, by the rules for this case, PyTorch's."""
    monkeypatch.delenv("FASTGEN_IMPL", raising=False)
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3).requires_grad_()
    for impl, expected in (("auto", []), ("triton", ["correlate"])):
        with ops.use_impl(impl):
            ops.conv2d_norm_act(x, weight, norm="none").sum().backward()
        assert launched == expected


@pytest.mark.parametrize("name", ("odd", "reflect", "groups", "transposed", "transposed-groups"))
def test_its_own_gradients(name):
    """The op is linear in both factors; its gradients are compared with float64."""
    geometry, grad, x, weight = operands(name)
    direction, found = torch.randn_like(weight), []
    for dtype in (torch.float64, torch.float32):
        factors = grad.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
        if dtype == torch.float64:
            out = aten_gradients(geometry, *factors, weight.double(), (False, True))[1]
        else:
            out = weight_grad(geometry, *factors, weight)
        found.append(torch.autograd.grad(out, factors, direction.to(dtype)))
    for exact, actual in zip(*found, strict=True):
        assert error(actual, exact) < 16 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.skipif(not _tiers.INTERPRETED, reason="TRITON_INTERPRET=1 lets Triton's kernels run here")
def test_an_image_with_more_elements_than_32_bits_count():
    """The image's channels are 2^30 elements apart; only a few values are read, and the rest takes no memory."""
    width = 2**30
    try:
        x = torch.empty(1, 3, 1, width, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    x[..., 0] = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)
    geometry, weight = Geometry((1, width), (0, 0), None, 1, (1, 1)), torch.ones(2, 3, 1, 1, dtype=torch.bfloat16)
    out = ops.conv2d_norm_act(x, weight, norm="none", activation="identity", stride=geometry.stride, impl="triton")
    assert out.flatten().tolist() == [7.0, 7.0]
    assert weight_grad(geometry, torch.ones_like(out), x, weight).flatten().tolist() == [1.0, 2.0, 4.0] * 2
