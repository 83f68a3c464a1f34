"""Rows of DCGAN-64 as a whole on a GPU: a training step, and its generator in inference, one image at a time."""

import copy
import functools
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_session import Clock
from benchmarks.test_training import GAN, distance, prepared, stepper
from benchmarks.traffic import H200, Work
from fastgen import Engine
from tests.support.tolerance import error


def networks(clock: Clock, device: str = "cuda", batch: int = 512) -> Iterator[dict]:
    """The rows of the training step and of the generator, in bfloat16."""
    torch.manual_seed(0)
    model = GAN().to(device)
    inputs = [t.to(device) for t in model.inputs(batch)]
    exact = stepper(copy.deepcopy(model).double(), [t.double() for t in inputs], "fp32")(False)
    with FlopCounterMode(display=False) as counter:
        stepper(copy.deepcopy(model), inputs, "fp32")(False)
    facts = {"case": "DCGAN-64 training step", "batch": batch, "dtype": "torch.bfloat16", "what": "step"}
    floor = 1e3 * Work(0, counter.get_total_flops()).floor(H200, "16 bits")
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    allowed = 0.0
    for name, peer, mode in (
        ("eager channels_last", "eager", None),
        # no CUDA graphs: they fail when one discriminator is called several times in a step
        ("max-autotune channels_last", "compile", "max-autotune-no-cudagraphs"),
        ("fastgen auto", "fastgen", None),
    ):
        torch._dynamo.reset()
        trained = copy.deepcopy(model).to(memory_format=torch.channels_last)
        prepared(trained, peer, mode)
        step = stepper(trained, inputs, "bf16")
        worst = distance(step(False), exact)
        allowed = allowed or 2 * worst
        found = {"ms": clock(step), "floor_ms_h200": floor, "error": worst, "correct": worst < allowed}
        yield facts | {"peer": name} | found

    generator = model.generator.eval().requires_grad_(False)
    z = inputs[1][:1].contiguous()
    exact_image = copy.deepcopy(generator).double()(z.double())
    size = sum(p.numel() for p in generator.parameters()) * 2
    facts = {"case": "DCGAN-64 generator", "batch": 1, "dtype": "torch.bfloat16", "what": "inference"}
    half = copy.deepcopy(generator).to(torch.bfloat16, memory_format=torch.channels_last)
    engine = Engine(generator, z, precision="bf16")
    peers = {
        "eager channels_last": (half, z.bfloat16()),
        "reduce-overhead channels_last": (torch.compile(half, mode="reduce-overhead"), z.bfloat16()),
        "max-autotune channels_last": (torch.compile(half, mode="max-autotune"), z.bfloat16()),
        "fastgen Engine": (engine, z),
    }
    for name, (call, x) in peers.items():
        with torch.no_grad():
            worst = error(call(x), exact_image)
            found = {
                "ms": clock(functools.partial(call, x)),
                "floor_ms_h200": 1e3 * Work(size, 0).floor(H200, "16 bits"),
            }
        yield facts | {"peer": name} | found | {"error": worst, "correct": worst < 3e-2}
