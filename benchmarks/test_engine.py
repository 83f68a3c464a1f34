"""Generators in inference: Engine beside eager PyTorch, torch.compile with freezing, ONNX Runtime and OpenVINO.

All on torch.get_num_threads() threads, outputs checked against float64. The compiled peers cost minutes of tuning.
"""

import functools
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from tests.support.networks import ResnetGenerator, VanillaVAE
from tests.support.tolerance import error


class Decoder(nn.Module):
    def __init__(self, vae: VanillaVAE):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


def dcgan() -> nn.Module:
    return nn.Sequential(*fastgen.create_model("dcgan").generator.main)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DCGAN-64 generator": (dcgan, (100, 1, 1)),
    "CycleGAN ResNet-9, 256x256": (lambda: ResnetGenerator(64, 9), (3, 256, 256)),
    "conv VAE-64 decoder": (lambda: Decoder(VanillaVAE(128, (32, 64, 128, 256, 512))), (128,)),
}
PEERS = ("eager", "channels_last", "compile", "onnxruntime", "openvino", "fastgen")
FEW = ("onnxruntime", "openvino", "fastgen")
PRECISIONS = {"fp32": 1e-4, "bf16": 3e-2}  # -> the relative L2 error up to which an output counts as right
ROWS = [("DCGAN-64 generator", 1), ("DCGAN-64 generator", 64), ("CycleGAN ResNet-9, 256x256", 1),
        ("conv VAE-64 decoder", 1), ("conv VAE-64 decoder", 64)]  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (64, 128, 192, 256)


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.requires_grad_(False)


@functools.cache
def oracle(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int, int]:
    """An input, the output in float64, the number of operations, and the number of values that the layers read and
    write."""
    model, x = model_of(name), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        nonlocal values
        values += inputs[0].numel() + layer.weight.numel() + out.numel()

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    exact = model.double()(x.double())
    model.float()
    return x, exact, counter.get_total_flops(), values


def runner(peer: str, model: nn.Module, x: Tensor, precision: str) -> Callable[[], Tensor] | None:
    """() -> output, by one peer; None if the peer does not support the precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    threads = torch.get_num_threads()
    if peer in ("eager", "channels_last", "compile"):
        import copy

        model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
        if peer != "eager":
            model = model.to(memory_format=torch.channels_last)
        if peer == "compile":
            torch._inductor.config.freezing = True
            model = torch.compile(model, mode="max-autotune")

        def run() -> Tensor:
            with torch.no_grad():
                return model(x)

        return run
    if peer == "fastgen":
        engine = fastgen.Engine(model, x, precision=precision, impl="cpp")
        return lambda: engine(x)
    pytest.importorskip(peer)
    exported = io.BytesIO()
    torch.onnx.export(model, (x,), exported, dynamo=False)
    array = x.numpy()
    if peer == "onnxruntime":
        import onnxruntime

        if precision != "fp32":
            return None  # it does not support bfloat16 convolutions on the CPU
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda: torch.from_numpy(session.run(None, {name: array})[0])
    import openvino

    core = openvino.Core()
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(exported.getvalue()), "CPU", settings).create_infer_request()
    return lambda: torch.from_numpy(request.infer({0: array})[0])


def compare(
    name: str, shape: tuple[int, ...], peers: tuple[str, ...], precision: str, table: str, row: str, measure
) -> None:
    x, exact, flops, values = oracle(name, shape)
    calls, facts = {}, {}
    torch._dynamo.reset()
    for peer in peers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = runner(peer, model_of(name), x, precision)
            if run is None:
                continue
            worst = error(run(), exact)
        calls[peer], facts[peer] = run, {"error": worst, "correct": worst < PRECISIONS[precision]}
        torch._inductor.config.freezing = False
    measure(calls, facts, 20, table=table, row=row, flops=flops, bytes=values * {"fp32": 4, "bf16": 2}[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "batch"), ROWS, ids=lambda value: str(value).replace(" ", "-"))
def test_inference(name, batch, precision, measure):
    shape, row = (batch, *MODELS[name][1]), f"{name}, batch {batch}"
    compare(name, shape, PEERS, precision, f"Inference, {precision}", row, measure)


@pytest.mark.parametrize("batch", BATCHES)
def test_latency_against_batch(batch, measure):
    name = "DCGAN-64 generator"
    compare(name, (batch, *MODELS[name][1]), FEW, "fp32", f"{name}, against the batch", str(batch), measure)


@pytest.mark.parametrize("size", SIZES)
def test_latency_against_size(size, measure):
    table = "CycleGAN ResNet-9, against the image's side"
    compare("CycleGAN ResNet-9, 256x256", (1, 3, size, size), FEW, "fp32", table, str(size), measure)


COLD = {
    "eager": """
import sys, torch
from torch import nn
layers, c = [], 100
for i, k in enumerate((512, 256, 128, 64)):
    layers += [nn.ConvTranspose2d(c, k, 4, 2 if i else 1, 1 if i else 0, bias=False), nn.BatchNorm2d(k), nn.ReLU(True)]
    c = k
model = nn.Sequential(*layers, nn.ConvTranspose2d(c, 3, 4, 2, 1, bias=False), nn.Tanh()).eval()
model.load_state_dict(torch.load(sys.argv[1] + "/g.pth", weights_only=True))
with torch.no_grad():
    model(torch.randn(1, 100, 1, 1))
""",
    "fastgen": """
import sys
import numpy
from fastgen.runtime import Plan
Plan.load(sys.argv[1] + "/g.fgplan")(numpy.random.default_rng(0).standard_normal((1, 100), dtype=numpy.float32))
""",
}


def test_cold_start(measure, tmp_path):
    """From the start of a process to its first image; the plan's process imports no torch."""
    name = "DCGAN-64 generator"
    model = model_of(name)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    fastgen.Engine(model, torch.randn(1, 100, 1, 1), impl="cpp").save(tmp_path / "g.fgplan")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    calls = {
        peer: functools.partial(
            subprocess.run, [sys.executable, "-c", code, str(tmp_path)], check=True, env=environment
        )
        for peer, code in COLD.items()
    }
    measure(calls, {peer: {"error": 0.0, "correct": True} for peer in COLD}, 7, table="Cold start", row=name)
