"""Generators in inference: Engine beside eager PyTorch, torch.compile with freezing, ONNX Runtime and OpenVINO.

All on torch.get_num_threads() threads, each peer timed in a block of its own, outputs checked against float64.
"""

import functools
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from tests.inference.networks import ResnetGenerator, VanillaVAE


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
PRECISIONS = {"fp32": 1e-4, "bf16": 3e-2}  # and the relative L2 error up to which an output is right
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
def oracle(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """An input, the output in float64, and the number of operations."""
    model, x = model_of(name), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        model(x)
    exact = model.double()(x.double())
    model.float()
    return x, exact, counter.get_total_flops()


def runner(peer: str, model: nn.Module, x: Tensor, precision: str) -> Callable[[], Tensor]:
    """() -> output, by one peer; skips what it has not."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    threads = torch.get_num_threads()
    if peer in ("eager", "channels_last", "compile"):
        import copy

        model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
        if peer != "eager":
            model = model.to(memory_format=torch.channels_last)
        if peer == "compile":
            torch._dynamo.reset()
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
            pytest.skip("onnxruntime computes no bfloat16 convolutions on the CPU")
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


def compare(name: str, shape: tuple[int, ...], peer: str, precision: str, table: str, row: str, measure) -> None:
    x, exact, flops = oracle(name, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = runner(peer, model_of(name), x, precision)
        run()
        start = time.perf_counter()
        error = ((run().double() - exact).norm() / exact.norm()).item()
    took = time.perf_counter() - start
    facts = {"flops": flops, "error": error, "correct": error < PRECISIONS[precision]}
    measure(run, rounds=int(min(300, max(7, 2 / took))), table=table, row=row, column=f"{peer} {precision}", **facts)
    torch._inductor.config.freezing = False


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("name", "batch"), ROWS, ids=lambda value: str(value).replace(" ", "-"))
def test_inference(name, batch, peer, precision, measure):
    compare(
        name, (batch, *MODELS[name][1]), peer, precision, f"Inference, {precision}", f"{name}, batch {batch}", measure
    )


@pytest.mark.parametrize("peer", ("onnxruntime", "openvino", "fastgen"))
@pytest.mark.parametrize("batch", BATCHES)
def test_latency_against_batch(batch, peer, measure):
    name = "DCGAN-64 generator"
    compare(name, (batch, *MODELS[name][1]), peer, "fp32", f"{name}, against the batch", str(batch), measure)


@pytest.mark.parametrize("peer", ("onnxruntime", "openvino", "fastgen"))
@pytest.mark.parametrize("size", SIZES)
def test_latency_against_size(size, peer, measure):
    compare("CycleGAN ResNet-9, 256x256", (1, 3, size, size), peer, "fp32", "CycleGAN ResNet-9, against the image's side",
            str(size), measure)  # fmt: skip


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


@pytest.mark.parametrize("peer", COLD)
def test_cold_start(peer, measure, tmp_path):
    """From the start of a process to its first image; the plan's process imports no torch."""
    name = "DCGAN-64 generator"
    model = model_of(name)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    fastgen.Engine(model, torch.randn(1, 100, 1, 1), impl="cpp").save(tmp_path / "g.fgplan")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COLD[peer], str(tmp_path)]
    measure(lambda: subprocess.run(command, check=True, env=environment), rounds=7, table="Cold start", row=name,
            column=peer, flops=np.nan, error=0.0, correct=True)  # fmt: skip
