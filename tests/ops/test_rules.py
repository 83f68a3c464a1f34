"""The rules that choose between fastgen's kernels and PyTorch's, for every class of processor, on any machine."""

import pytest
import torch
from torch import nn

from fastgen import ops
from fastgen.nn import _run
from fastgen.ops import _choices, _memo, _policy, _processor, _rules
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import TensorSpec
from fastgen.ops._processor import Processor
from fastgen.ops._question import Choice
from tests.cases import PROCESSORS, TESTED
from tests.support.process import run_python
from tests.support.tolerance import UNIT_ROUNDOFF

STRIDED, TRANSPOSED = Geometry((2, 2), (1, 1), None, 1, (1, 1)), Geometry((2, 2), (1, 1), (1, 1), 1, (1, 1))
PLAIN = STRIDED._replace(stride=(1, 1))
by_processor = pytest.mark.parametrize("name", PROCESSORS)


def weight(outputs, inputs, kernel, dtype=torch.float32, last=True):
    return TensorSpec((outputs, inputs, kernel, kernel), dtype, torch.device("cpu"), last)


def forward(name, geometry, x, kind, batch_stats=False):
    return decided(_rules.FORWARD, name, geometry, x, kind, kind.channels_last, batch_stats)


def weight_grad(name, geometry, x, kind, last):
    return decided(_rules.WEIGHT_GRAD, name, geometry, x, kind, last)


def decided(rules, name, geometry, x, kind, last, batch_stats=False):
    """Whether the rules choose fastgen's kernel."""
    of_weight = rules is _rules.WEIGHT_GRAD
    question = (PROCESSORS[name], geometry, x, kind.shape, kind.dtype, kind.device.type, last, batch_stats, of_weight)
    return _rules.decide(rules, _rules.Convolution(*question)).fastgen


@by_processor
def test_winograd(name):
    """3x3 kernels with stride 1 from 8x8 pixels on, and 4x4 kernels with stride 2: in float32, on every processor."""
    assert forward(name, PLAIN, (1, 64, 16, 16), weight(64, 64, 3))
    assert not forward(name, PLAIN, (1, 8, 16, 16), weight(8, 8, 3))
    four = TRANSPOSED._replace(output_padding=(0, 0))
    assert forward(name, four, (1, 64, 8, 8), weight(64, 64, 4))
    assert weight_grad(name, four, (64, 64, 8, 8), weight(64, 64, 4), True)


@by_processor
def test_dtypes_without_instructions(name):
    """PyTorch would compute them in a plain loop, so fastgen computes every convolution."""
    processor = PROCESSORS[name]
    for dtype, has in ((torch.bfloat16, processor.torch_bf16), (torch.float16, processor.torch_fp16)):
        kind = weight(32, 32, 3, dtype)
        assert forward(name, PLAIN, (1, 32, 8, 8), kind) == (not has)
        assert weight_grad(name, PLAIN, (1, 32, 2, 8), kind, True) == (not has)
    assert not forward(name, PLAIN, (1, 32, 9, 9), weight(32, 32, 5, torch.float64))


@by_processor
def test_pairs_of_bfloat16(name):
    """fastgen's bfloat16 kernels are chosen for many channels with a stride of 2."""
    kind = weight(256, 128, 4, torch.bfloat16)
    processor = PROCESSORS[name]
    assert forward(name, STRIDED, (64, 128, 16, 16), kind) == (processor.fastgen_bf16 or not processor.torch_bf16)


@by_processor
@pytest.mark.parametrize(("side", "last"), ((128, True), (128, False), (16, True)))
def test_weight_gradients_of_large_images_without_avx512(name, side, last):
    """Without AVX-512 oneDNN's are slow for large channels_last images with a stride of 2."""
    wins = side == 128 and last and name == "avx2"
    assert weight_grad(name, STRIDED, (1, 32, side, side), weight(64, 32, 3, last=last), last) == wins
    assert weight_grad(name, TRANSPOSED, (1, 64, side // 2, side // 2), weight(64, 32, 3, last=last), last) == wins


@by_processor
def test_kernels_of_three_without_avx512(name):
    """Without AVX-512 oneDNN is slower on small images and with a stride of 2, except on large contiguous images."""
    avx2 = name == "avx2"
    last, first = (weight(128, 128, 3, last=order) for order in (True, False))
    small, large = (64, 128, 4, 4), (64, 128, 32, 32)
    for geometry in (STRIDED, TRANSPOSED):
        assert forward(name, geometry, large, last) == forward(name, geometry, small, first) == avx2
    assert weight_grad(name, STRIDED, large, last, True) == weight_grad(name, STRIDED, small, first, False) == avx2
    assert weight_grad(name, TRANSPOSED, small, last, True) == avx2
    assert not forward(name, STRIDED, large, first)
    assert forward(name, PLAIN, small, first) == weight_grad(name, PLAIN, (64, 128, 2, 2), first, False) == avx2
    assert not forward(name, PLAIN, (1, 128, 9, 9), last) and not weight_grad(name, PLAIN, small, last, True)
    few = weight(64, 64, 3, last=False)
    assert not weight_grad(name, STRIDED, (64, 64, 32, 32), few, False)
    assert not weight_grad(name, STRIDED, (1, 64, 16, 16), few, True)


# (transposed, batch, channels in and out, kernel, stride, padding, dilation, height and width, output_padding): images
# that are narrow or consist of padding
WRONG_IN_BFLOAT16 = [
    (True, 1, 16, 16, (4, 4), (2, 2), (1, 1), (1, 1), (9, 1)),
    (True, 4, 48, 8, (4, 4), (2, 2), (2, 2), (2, 2), (8, 1)),
    (True, 2, 16, 8, (3, 4), (2, 2), (3, 3), (3, 3), (6, 2), (2, 2)),  # x's gradient is part of the adjoint's output
    (False, 1, 8, 8, (4, 3), (1, 3), (1, 2), (1, 2), (7, 2)),
    (False, 2, 16, 1, (4, 5), (1, 2), (1, 2), (1, 2), (7, 5)),
    (False, 4, 1, 32, (3, 2), (2, 2), (0, 1), (1, 1), (8, 1)),
    (False, 4, 3, 8, (2, 4), (1, 3), (2, 2), (3, 1), (1, 24)),
]


def rule(kind):
    transposed, n, inputs, outputs, kernel, stride, padding, dilation, size, *output_padding = kind
    geometry = Geometry(stride, padding, (*output_padding, (0, 0))[0] if transposed else None, 1, dilation)
    shape = (inputs, outputs, *kernel) if transposed else (outputs, inputs, *kernel)
    return geometry, (n, inputs, *size), TensorSpec(shape, torch.bfloat16, torch.device("cpu"), False)


@by_processor
@pytest.mark.parametrize("kind", WRONG_IN_BFLOAT16, ids=str)
def test_fastgen_computes_what_pytorch_computes_wrongly(name, kind, monkeypatch):
    """fastgen computes it whatever was measured, even where small convolutions are otherwise left to PyTorch's
    modules."""
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS[name])
    monkeypatch.setattr(_choices, "measured", lambda *_: Choice("torch"))
    monkeypatch.setattr(_rules, "SMALL_WITH_GRADIENTS", 10**9)
    _memo.forget()
    geometry, x, weight = rule(kind)
    wrong = PROCESSORS[name].torch_bf16
    expected = TESTED if wrong else "torch"
    assert _policy.fastest_forward(geometry, x, weight).implementation == expected
    assert _policy.fastest_weight_grad(geometry, x, weight, False).implementation == expected
    if geometry.transposed:
        assert _policy.fastest_input_grad(geometry, x, weight).implementation == expected
    float32 = weight._replace(dtype=torch.float32)
    assert _policy.fastest_forward(geometry, x, float32).implementation == "torch"
    assert _policy.fastest_weight_grad(geometry, x, float32, False).implementation == "torch"
    layer = (nn.ConvTranspose2d if geometry.transposed else nn.Conv2d)(
        *kind[2:5], stride=kind[5], padding=kind[6], dilation=kind[7]
    ).bfloat16()
    assert not _run._is_small(torch.zeros(x, dtype=torch.bfloat16), layer)
    _memo.forget()


@pytest.mark.parametrize("impl", ("auto", "cpp"))
@pytest.mark.parametrize("kind", WRONG_IN_BFLOAT16, ids=str)
def test_narrow_images_in_bfloat16(kind, impl, poisoned):
    """With AMX PyTorch's results are arbitrary, or the process crashes."""
    geometry, shape, weight = rule(kind)
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    if geometry.transposed:
        options["output_padding"] = geometry.output_padding
    op = getattr(ops, geometry.fused()[0])
    for _ in range(2):
        tensors = [torch.randn(size).bfloat16().requires_grad_() for size in (shape, weight.shape)]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        y, exact_y = (
            op(*inputs, **options, norm="none", activation="identity", impl=impl if inputs is tensors else "reference")
            for inputs in (tensors, exact)
        )
        upstream = torch.randn(exact_y.shape).bfloat16()
        found = torch.autograd.grad(y, tensors, upstream)
        expected = torch.autograd.grad(exact_y, exact, upstream.double())
        for value, exact_value in zip((y, *found), (exact_y, *expected), strict=True):
            scale = exact_value.abs().max().clamp_min(1e-6)
            assert (value.double() - exact_value).abs().max() <= 0.02 * scale


@pytest.mark.parametrize("kind", (WRONG_IN_BFLOAT16[0], WRONG_IN_BFLOAT16[3]), ids=("transposed", "strided"))
def test_narrow_images_in_a_compiled_graph(kind):
    """Where the widths vary, the rule is a guard: a graph for wide images is not taken for narrow ones."""
    geometry, (n, channels, height, width), weight = rule(kind)
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    op = getattr(ops, geometry.fused()[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: op(x, w, **options), dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (24, width):
        x, w = torch.randn(n, channels, height, size).bfloat16(), torch.randn(weight.shape).bfloat16()
        exact = op(x.double(), w.double(), **options, impl="reference")
        assert (compiled(x, w).double() - exact).norm() <= 2 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()


FOUND = """
from fastgen.ops._processor import here
print(here())
"""
ISA = "FASTGEN_CPU_ISA"


def test_this_processor_within_the_environments_limits():
    """Instructions that the environment forbids are not reported."""

    def found(**limits):
        return eval(run_python(FOUND, environment=limits).stdout, {"Processor": Processor})

    assert not found(**{ISA: "avx2"}).fastgen_bf16
    limited = found(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", **{ISA: "baseline"})
    assert limited.vectors == "DEFAULT" and not (limited.torch_bf16 or limited.fastgen_bf16)
