"""Which tier runs: a measured one with its tile, in a compiled graph, on a GPU; and dtypes that PyTorch does not
multiply."""

import pytest
import torch
from torch import nn

import fastgen
from fastgen import ops
from fastgen.ops import _autograd, _candidates, _choices, _convolution_grad, _dispatch, _policy, _processor, _tiers
from fastgen.ops._layout import TensorSpec
from fastgen.ops._question import Question
from fastgen.ops._tiers import ON_CPU
from tests.cases import PROCESSORS
from tests.ops.measured import GEOMETRY, WEIGHT, X, keep, key
from tests.support.process import run_python
from tests.support.tolerance import BFLOAT16, FLOAT32

if ON_CPU:
    pytest.skip("nothing is measured of kernels in another's place", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("folder")


def test_a_compiled_graph_uses_the_choice_for_its_sizes():
    """A graph with dynamic sizes follows the rules."""
    x, weight = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 4, 4)
    keep([key()], "torch")
    for dynamic, implementation in ((False, "unfused"), (True, "cpp")):
        torch._dynamo.reset()
        before = ops.implementations_used().get("conv_transpose2d_norm_act", {}).get(implementation, 0)
        compiled = torch.compile(
            lambda x: ops.conv_transpose2d_norm_act(x, weight, norm="none", activation="relu", stride=2, padding=1),
            fullgraph=True, dynamic=dynamic, backend="aot_eager",
        )  # fmt: skip
        expected = torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1).relu()
        torch.testing.assert_close(compiled(x), expected, **FLOAT32)
        assert ops.implementations_used()["conv_transpose2d_norm_act"][implementation] > before


def test_a_gpus_tiers(monkeypatch):
    """The table's tier and tile reach the launch, unless another tier is requested."""
    monkeypatch.setattr(_tiers, "_gpu_unavailable", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")
    spec = TensorSpec(tuple(WEIGHT.shape), torch.bfloat16, torch.device("cuda:0"), True)
    question = Question("forward", GEOMETRY, tuple(X.shape), *spec[:2], "cuda:0", True, False)
    monkeypatch.setattr(_autograd, "call", lambda op, *args: _dispatch._tier(op, "cuda:0", torch.bfloat16))

    def chosen(impl, fastest):
        return _dispatch._choose("conv2d_norm_act", impl, "cuda:0", torch.bfloat16, fastest.implementation, False)

    for named in ("cuda", "triton", "triton 64x64x64x4x3", "torch"):
        _choices.save("gpu", {str(question): (named, {})})
        fastest = _policy.fastest_forward(GEOMETRY, X.shape, spec)
        assert str(fastest) == named
        assert chosen("auto", fastest) == ("unfused" if named == "torch" else fastest.implementation)
        if named != "torch":
            assert _dispatch.call("conv2d_norm_act", fastest) == (fastest.implementation, fastest.tile)
        with ops.use_impl("cuda"):
            assert chosen("cuda", fastest) == "cuda"
            assert _dispatch.call("conv2d_norm_act", _dispatch.ANY) == ("cuda", "")
    assert _dispatch.call("conv2d_norm_act", _dispatch.ANY) == ("triton", "")
    monkeypatch.setattr(_tiers, "_gpu_unavailable", lambda tier, *_: None if tier == "triton" else "no nvcc")
    _choices.save("gpu", {str(question): ("cuda", {})})
    assert str(_policy.fastest_forward(GEOMETRY, X.shape, spec)) == "triton"  # transposed, in 16 bits


def test_the_tier_of_a_memory_bound_op(monkeypatch):
    """The measured tier runs the op and its gradient, if it can run and no other is requested."""
    from benchmarks import gpu

    monkeypatch.setattr(_tiers, "_gpu_unavailable", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")

    def taken(op):
        chosen = _dispatch._choose(op, "auto", "cuda:0", torch.float32, "", False)
        return chosen, _dispatch._tier(f"{op}_backward", "cuda:0", torch.float32)[0]

    rows = [
        {"case": case, "what": "forward + backward", "peer": f"fastgen {tier}", "ms": ms, "correct": correct}
        for case, times in (("spectral_norm BigGAN-128 D", (2.0, 1.0)), ("reparameterize_kl", (1.0, 2.0)))
        for tier, ms, correct in (("triton", times[0], True), ("cuda", times[1], case != "reparameterize_kl"))
    ]
    gpu.prefer({"rows": rows})
    assert taken("spectral_norm") == taken("spectral_norm_group") == ("cuda", "cuda")
    assert taken("norm_act") == taken("reparameterize") == ("triton", "triton")
    with ops.use_impl("triton"):
        assert _dispatch._tier("spectral_norm", "cuda:0", torch.float32)[0] == "triton"
    monkeypatch.setattr(_tiers, "_gpu_unavailable", lambda tier, *_: None if tier == "triton" else "no nvcc")
    assert taken("spectral_norm") == ("triton", "triton")


def test_a_gpus_weight_gradient(monkeypatch):
    """cuDNN computes it if nothing was measured; Triton's kernel is a candidate, and runs if requested."""
    monkeypatch.setattr(_tiers, "_gpu_unavailable", lambda *_: None)
    monkeypatch.setattr(_choices, "chip", lambda device: "gpu")
    spec = TensorSpec(tuple(WEIGHT.shape), torch.bfloat16, torch.device("cuda:0"), True)
    with _policy.recorded() as questions:
        assert _policy.fastest_weight_grad(GEOMETRY, X.shape, spec, True).implementation == "torch"
    ((question, by_rules),) = questions.items()
    assert by_rules.implementation == "torch" and _candidates.names(question) == ["torch", "triton"]
    _choices.save("gpu", {str(question): ("triton 64x64x64x4x3", {})})
    x = torch.empty(0, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(_dispatch, "has_kernels", lambda x: True)
    for impl, expected in (("auto", "triton 64x64x64x4x3"), ("triton", ""), ("cuda", "")):
        with ops.use_impl(impl):
            choice = _convolution_grad._choice(x, _policy.fastest_weight_grad, GEOMETRY, X.shape, spec, True)
            assert str(choice) == expected


@pytest.mark.parametrize("images_last", (False, True))
def test_tiles_of_a_weight_gradient(images_last):
    """The tiles are those of the product's kind, which depends on the images' memory order."""
    pytest.importorskip("triton", reason="triton is not installed")
    question = Question(
        "weight_grad", GEOMETRY, tuple(X.shape), tuple(WEIGHT.shape), torch.bfloat16, "cpu", True, images_last
    )
    kinds = _tiers.triton.kernels("_tiles").TILES
    tiles = [f"triton {tile}" for tile in kinds["16 bits" if images_last else "gathered"]]
    assert _candidates.tiles(question) == tiles


LAUNCHES = """
import torch
from fastgen import ops
from fastgen.ops import _choices, _policy, _tiers
_choices.chip = lambda device: "interpreter"
x, weight = torch.ones(1, 16, 8, 8).requires_grad_(), torch.ones(16, 16, 4, 4).requires_grad_()
def launches():
    with _tiers.triton.kernels("_launch").recorded() as launches:
        out = ops.conv_transpose2d_norm_act(x, weight, norm="none", activation="relu", stride=2, padding=1)
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    return [(of["ROWS"], of["COLUMNS"], of["DEPTH"]) for _, _, of, _ in launches if "COLUMNS" in of]
with _policy.recorded() as questions:
    launches()
torch.backends.cudnn.conv.fp32_precision = "ieee"
for tile in _tiers.triton.kernels("_tiles").TILES["ieee"]:
    _choices.save("interpreter", {str(q): (f"triton {tile}", {}) for q in questions})
    assert launches() == [tile[:3]] * 3, launches()
    with ops.use_impl("reference"):
        assert launches() == []
_choices.save("interpreter", {str(q): ("cuda", {}) for q in questions})  # cannot run: the rules
assert launches()
"""


def test_a_measured_tile_is_launched():
    """Forward and both gradients."""
    pytest.importorskip("triton", reason="triton is not installed")
    run_python(LAUNCHES, environment={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(("processor", "multiplies"), (("avx2", False), ("amx", True)))
def test_dtypes_that_pytorch_does_not_multiply(processor, multiplies, monkeypatch):
    """The op then computes even a small convolution that would otherwise be PyTorch's, with the same result."""
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS[processor])
    _choices.forget()
    model = fastgen.nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    before = ops.implementations_used().get("conv2d_norm_act", {}).get("cpp", 0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert ops.implementations_used()["conv2d_norm_act"].get("cpp", 0) == before + (not multiplies)
    torch.testing.assert_close(y.float(), expected, **BFLOAT16)
    _choices.forget()
