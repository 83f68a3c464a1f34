"""The algorithm of fastgen's CPU kernels: fastgen::algorithm returns the right one, and the kernels use it."""

import pytest
import torch

from fastgen import ops
from fastgen._build import native
from fastgen.ops import _processor  # noqa: F401 (it defines fastgen::algorithm)
from tests.cases import TESTED

pytestmark = pytest.mark.skipif(TESTED != "cpp", reason="the C++ kernels are replaced")

DIRECT, ROWS, WINOGRAD_4X2, WINOGRAD_4X3 = range(4)


def algorithm(
    n: int,
    channels: tuple[int, int],
    size: int,
    kernel: int,
    stride: int,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    dilation: int = 1,
    groups: int = 1,
    batch_stats: bool = False,
    weight_gradient: bool = False,
) -> int:
    """The algorithm for `size` output pixels along each axis and a padding of 1."""
    assert native.load() is None
    reach = dilation * (kernel - 1) + 1
    size_in = (size + 2 - reach) // stride + 1 if transposed else (size - 1) * stride - 2 + reach
    return torch.ops.fastgen.algorithm(
        n, channels[0], size_in, size_in, channels[1], size, size, kernel, kernel, (stride, stride), (1, 1),
        (dilation, dilation), groups, transposed, dtype, batch_stats, weight_gradient,
    )  # fmt: skip


@pytest.mark.parametrize("transposed", (False, True), ids=("conv2d", "conv_transpose2d"))
def test_thresholds(transposed):
    def ask(*arguments, **options):
        return algorithm(*arguments, transposed=transposed, **options)

    wide = (16, 16)
    # 4x4 and stride 2: from 1024 output pixels and 16 channels on
    assert ask(4, wide, 16, 4, 2) == WINOGRAD_4X2
    assert ask(3, wide, 16, 4, 2) == ask(4, (15, 16), 16, 4, 2) == ask(4, (16, 15), 16, 4, 2) == DIRECT
    # 3x3 and stride 1: from 256 output pixels, 8 lines and 16 channels on
    assert ask(4, wide, 8, 3, 1) == WINOGRAD_4X3
    assert ask(3, wide, 8, 3, 1) == ask(99, wide, 7, 3, 1) == ask(4, (15, 16), 8, 3, 1) == DIRECT
    # Convolutions that the algorithms cannot compute
    assert ask(64, wide, 16, 5, 1) == ask(64, wide, 16, 3, 1, dilation=2) == ask(64, wide, 16, 3, 1, groups=2) == DIRECT
    assert ask(64, wide, 16, 4, 2, dtype=torch.float64) == DIRECT
    for dtype in (torch.bfloat16, torch.float16):
        assert ask(64, wide, 16, 4, 2, dtype=dtype) == WINOGRAD_4X2
    # Few output channels, unless statistics of the output are needed
    assert ask(64, (16, 4), 16, 4, 2) == ROWS
    assert ask(64, (16, 5), 16, 4, 2) == ask(64, (16, 4), 16, 4, 2, batch_stats=True) == DIRECT


def test_three_taps_with_stride_2():
    """The smaller of input and output needs 8 rows, or 4 for the gradient of the weight."""
    for weight_gradient, least in ((False, 8), (True, 4)):
        found = [algorithm(1024, (16, 16), size, 3, 2, weight_gradient=weight_gradient) for size in (least, least - 1)]
        assert found == [WINOGRAD_4X2, DIRECT]
    assert algorithm(64, (16, 4), 16, 3, 2, weight_gradient=True) == DIRECT  # not rows


def test_environment_is_ignored(monkeypatch):
    for winograd in ("0", "always"):
        monkeypatch.setenv("FASTGEN_WINOGRAD", winograd)
        assert algorithm(4, (16, 16), 8, 3, 1) == WINOGRAD_4X3
        assert algorithm(3, (16, 16), 8, 3, 1) == DIRECT


@pytest.mark.parametrize(
    "n, channels, size, kernel, stride",
    ((4, 16, 16, 4, 2), (3, 16, 16, 4, 2), (4, 15, 16, 4, 2), (4, 16, 8, 3, 1), (3, 16, 8, 3, 1), (16, 16, 8, 3, 2),
     (21, 16, 7, 3, 2)),
)  # fmt: skip
def test_kernels_use_the_algorithm(n, channels, size, kernel, stride, monkeypatch):
    """Winograd's algorithms round differently from the direct one, and FASTGEN_WINOGRAD=0 turns them off."""
    size_in = (size - 1) * stride - 2 + kernel
    x, weight = torch.randn(n, channels, size_in, size_in), torch.randn(16, channels, kernel, kernel)
    grad = torch.randn(n, 16, size, size)
    geometry = ((stride, stride), (1, 1), (), 1, (1, 1), False)

    def outputs() -> list[torch.Tensor]:
        options = {"stride": stride, "padding": 1, "norm": "none", "activation": "identity", "impl": "cpp"}
        out = ops.conv2d_norm_act(x, weight, **options)
        return [out, torch.ops.fastgen.convolution_weight_grad(grad, x, weight, *geometry)]

    by_size = outputs()
    monkeypatch.setenv("FASTGEN_WINOGRAD", "0")
    runs_winograd = [not torch.equal(*pair) for pair in zip(by_size, outputs(), strict=True)]
    algorithms = [algorithm(n, (channels, 16), size, kernel, stride, weight_gradient=grad) for grad in (False, True)]
    assert runs_winograd == [found in (WINOGRAD_4X2, WINOGRAD_4X3) for found in algorithms]
