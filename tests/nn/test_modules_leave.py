"""What fused modules leave to PyTorch's modules: inputs that no kernel takes, hooks, ONNX."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import fastgen
from fastgen import ops
from fastgen.nn import Reparameterize, Sequential, SpectralNormGroup, spectral_norm
from tests.support.tolerance import BFLOAT16, FLOAT32


class Image(torch.Tensor):
    """A tensor subclass, as other libraries use for images."""


IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
INPUTS = {
    **{
        "x".join(map(str, shape)): torch.randn(shape)
        for shape in (
            (4,), (2, 4), (4, 6), (4, 4), (4, 5, 6), (4, 6, 6), (6, 4, 6), (3, 4, 4, 4), (2, 4, 1, 1), (1, 4, 1, 1),
            (2, 5, 5, 5), (2, 4, 3, 3, 3), (4, 3, 3, 3), (2, 4, 2, 2, 2, 2), (2, 4, 0, 5), (),
        )
    },
    **{
        str(dtype): IMAGES.to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool,
        torch.float8_e4m3fn)
    },
    "sparse": IMAGES.to_sparse(),
    "quantized": torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8),
    "meta": IMAGES.to("meta"),
    "mkldnn": IMAGES.to_mkldnn(),
    "nested": torch.nested.nested_tensor(list(IMAGES)),
    "jagged": torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=torch.jagged),
    "subclass": IMAGES.as_subclass(Image),
    "expanded": IMAGES[:1].expand(3, 4, 6, 6),
    "list": [IMAGES],
}  # fmt: skip
RUNS = {
    "batch1d": lambda: [nn.BatchNorm1d(4), nn.ReLU()],
    "batch2d": lambda: [nn.BatchNorm2d(4), nn.ReLU()],
    "batch3d": lambda: [nn.BatchNorm3d(4), nn.ReLU()],
    "sync": lambda: [nn.SyncBatchNorm(4), nn.ReLU()],
    "instance1d": lambda: [nn.InstanceNorm1d(4), nn.ReLU()],
    "instance2d": lambda: [nn.InstanceNorm2d(4, affine=True), nn.ReLU()],
    "instance2d-tracked": lambda: [nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()],
    "instance3d": lambda: [nn.InstanceNorm3d(4), nn.ReLU()],
    "group": lambda: [nn.GroupNorm(2, 4), nn.ReLU()],
    "conv": lambda: [nn.Conv2d(4, 6, 3, 1, 1), nn.Tanh()],
    "reflect": lambda: [nn.Conv2d(4, 6, 3, 1, 2, padding_mode="reflect"), nn.ReLU()],
    "conv-group": lambda: [nn.Conv2d(4, 6, 3, 1, 1), nn.GroupNorm(2, 6), nn.ReLU()],
    "conv-batch": lambda: [nn.Conv2d(4, 6, 3, 1, 1), nn.BatchNorm2d(6, momentum=None), nn.ReLU()],
    "conv-instance": lambda: [nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.InstanceNorm2d(6), nn.ReLU()],
    "conv-sync": lambda: [nn.Conv2d(4, 6, 3, 1, 1), nn.SyncBatchNorm(6)],
    "spectral": lambda: [spectral_norm(nn.Conv2d(4, 6, 3, 1, 1)), nn.ReLU()],
}


def observe(model: nn.Module, x: object) -> tuple:
    """(type of the result or error, its values, the model's state)."""
    try:
        y = model(x)
    except Exception as error:
        return type(error), None, list(model.buffers())
    if y.is_nested:
        return type(y), [t.to_dense() for t in y.unbind()], list(model.buffers())
    return type(y), y.dequantize() if y.is_quantized else y if y.is_meta else y.to_dense(), list(model.buffers())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "by default"))
@pytest.mark.parametrize("run", RUNS)
def test_the_same_result_or_error(run, fused, request):
    """For images without a batch dimension, and other numbers of channels, dtypes, layouts and devices."""
    if fused:
        request.getfixturevalue("fused_when_small")
    torch.manual_seed(0)
    plain = nn.Sequential(*RUNS[run]())
    for name, x in INPUTS.items():
        for training in (True, False)[run == "spectral" :]:  # in training each access changes the vectors
            models = [copy.deepcopy(plain), fastgen.fuse(plain), Sequential(*copy.deepcopy(plain))]
            for model in models:
                model.train(training)
            expected, *found = [observe(model, x) for model in models]
            for actual in found:
                assert actual[0] is expected[0], (name, training, actual[0], expected[0])
                near = BFLOAT16 if name == "torch.bfloat16" else FLOAT32
                torch.testing.assert_close(
                    actual[1:], expected[1:], **near, msg=lambda text, name=name: f"{name}: {text}"
                )


REGISTER = (
    torch_module.register_module_forward_pre_hook,
    torch_module.register_module_forward_hook,
    torch_module.register_module_full_backward_pre_hook,
    torch_module.register_module_full_backward_hook,
)


class Model(nn.Module):
    """Runs of layers within a Sequential, and others that forward calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.last = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.InstanceNorm2d(3), nn.Tanh())

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x))))


@pytest.mark.usefixtures("fused_when_small")
@pytest.mark.parametrize("register", REGISTER, ids=lambda function: function.__name__)
def test_hooks_of_all_modules_are_called(register):
    plain, found = Model(), []
    for model in (plain, fastgen.fuse(plain)):
        seen = []
        handle = register(lambda module, inputs, *_, seen=seen: seen.append((type(module).__name__, inputs[0])))
        try:
            model(IMAGES.clone().requires_grad_()).square().sum().backward()
        finally:
            handle.remove()
        found.append(seen)
    assert len(found[0]) == 8
    for (name, expected), (called, actual) in zip(*found, strict=True):
        assert called == name
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


class Sampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.sample = Reparameterize()

    def forward(self, x):
        return self.sample(x, torch.full_like(x, -60.0))  # ONNX draws its own noise, so scale it to almost nothing


def grouped() -> nn.Module:
    model = nn.Sequential(
        spectral_norm(nn.Conv2d(4, 6, 3)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(6, 5, 3)), nn.ReLU()
    )
    SpectralNormGroup(model)
    return model


@pytest.mark.usefixtures("fused_when_small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", (False, True), ids=("torchscript", "dynamo"))
@pytest.mark.parametrize("make", (Model, grouped, Sampler), ids=lambda make: make.__name__)
def test_onnx(make, dynamo):
    """Both of PyTorch's exporters take the model unchanged, for any batch size."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, file = fastgen.fuse(make()).eval(), io.BytesIO()
    sizes = {"dynamic_shapes": ({0: torch.export.Dim.AUTO},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(model, (IMAGES,), file, input_names=["x"], dynamo=dynamo, **sizes)
    x = torch.cat([IMAGES, 1 - IMAGES, IMAGES[:1]])
    with torch.no_grad():
        expected = model(x).numpy()
    (found,) = runtime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected, **FLOAT32)


@pytest.mark.usefixtures("fused_when_small")
@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("impl", ("auto", "reference"))
@pytest.mark.parametrize("dim", (torch.export.Dim.AUTO, torch.export.Dim("n", min=2, max=64)), ids=("auto", "named"))
def test_an_exported_batch_has_the_range_of_pytorchs(dim, impl, strict):
    """The choice of the fastest kernel by batch size must not restrict the range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64),
                          nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Conv2d(3, 8, 16))  # fmt: skip
    x, ranges = torch.randn(8, 3, 32, 32), []
    for one in (model, fastgen.fuse(model)):
        with ops.use_impl(impl):
            program = torch.export.export(one.eval(), (x,), dynamic_shapes=({0: dim},), strict=strict)
        ranges.append([str(found) for found in program.range_constraints.values()])
    assert ranges[0] == ranges[1]
