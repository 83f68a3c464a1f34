"""The layers that are measured on a GPU: the contenders, their rows, and the choices for `auto`."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu_floors import LAYERS, as_modelled, trained
from benchmarks.gpu_parity import TOLERANCE, tiers
from benchmarks.gpu_session import milliseconds, tier_of
from benchmarks.traffic import H200, work
from fastgen import ops
from fastgen.inference._tune import tune_call
from fastgen.ops import _choices, _tiers
from tests.cases import OpCase
from tests.support.observe import differentiable
from tests.support.tolerance import error

TUNING = 90  # seconds for auto's choices
BATCHES = (64, 512)
NORM_ACT = OpCase(
    "norm_act", "dcgan64-g2", {"x": (512, 128, 16, 16), "norm_weight": (128,), "norm_bias": (128,)},
    {"norm": "batch", "training": True, "activation": "relu"},
)  # fmt: skip
MEMORY_BOUND = {
    "norm_act": NORM_ACT.id,
    "reparameterize": "reparameterize_kl",
    "spectral_norm": "spectral_norm BigGAN-128 D",
}


def peers(case: OpCase):
    """(name, whether in channels_last, call) of each contender."""
    reference = functools.partial(case.call, impl="reference")
    yield "eager", False, reference
    yield "eager channels_last", True, reference
    torch._dynamo.reset()
    yield "max-autotune channels_last", True, torch.compile(reference, mode="max-autotune")
    for tier, reason in tiers().items():
        if reason is None:
            yield f"fastgen {tier}", True, functools.partial(case.call, impl=tier)
    yield "fastgen auto", True, functools.partial(case.call, impl="auto")


def large() -> list[OpCase]:
    """The layers at each batch size; layers for a single image keep their batch size."""
    cases = []
    for batch in BATCHES:
        for case in LAYERS:
            n, *size = case.shapes["x"]
            if n > 1 or batch == BATCHES[0]:
                cases.append(replace(case, shapes=case.shapes | {"x": (1 if n == 1 else batch, *size)}))
    return cases


def tune(device: str = "cuda") -> list[str]:
    """Measures auto's choices for the layers in bfloat16 and channels_last, into the files that are part of fastgen;
    returns the ones for which time ran out."""

    def call():
        for case in large():
            trained(
                case.call,
                differentiable({name: t.to(device) for name, t in case.tensors(torch.bfloat16, True).items()}),
            )

    report = tune_call(call, seconds=TUNING, progress=print, folder=_choices.SHIPPED)
    print(report)
    return [f"auto's choice of {question}" for question in report.left_out]


def prefer(document: dict) -> None:
    """For each memory-bound op, makes `auto` choose the tier that is faster in training according to its rows."""
    chosen = {}
    for op, case in MEMORY_BOUND.items():
        both = [row for row in document["rows"] if row["case"] == case and row["what"] == "forward + backward"]
        ms = {row["peer"].removeprefix("fastgen "): row["ms"] for row in both if row["correct"]}
        ms = {tier: ms[tier] for tier in _tiers.GPU_TIERS if tier in ms}
        if len(ms) == 2:
            chosen[op] = (min(ms, key=ms.__getitem__), ms)
    if chosen:
        _choices.save(_choices.chip("cuda:0") or "", chosen, _choices.SHIPPED)


def measure(case: OpCase, dtype: torch.dtype, scratch: torch.Tensor) -> Iterator[dict]:
    """The rows of a layer."""
    tensors = {name: t.cuda() for name, t in case.tensors(dtype, True).items()}
    exact = case.call({n: t.double() for n, t in tensors.items()}, impl="reference")
    launched = as_modelled(case, differentiable({n: t.clone() for n, t in tensors.items()}))
    for name, channels_last, call in peers(case):
        inputs = differentiable({n: t.clone() for n, t in tensors.items()})
        if not channels_last:
            inputs = differentiable({n: t.detach().contiguous() for n, t in inputs.items()})
        facts = {"case": case.id, "batch": case.shapes["x"][0], "dtype": str(dtype), "peer": name}
        try:
            worst = error(call(inputs).detach(), exact)

            tier = tier_of(name)  # for the backward pass, too

            def forward(call=call, inputs=inputs):
                with torch.no_grad():
                    call(inputs)

            def both(call=call, inputs=inputs, tier=tier):
                with ops.use_impl(tier):
                    trained(call, inputs)

            for what, run in (("forward", forward), ("forward + backward", both)):
                floor = 1e3 * work(case, dtype, what != "forward").floor(H200, "16 bits")
                found = {"what": what, "ms": milliseconds(run, scratch), "floor_ms_h200": floor}
                found["launched_ms_h200"] = launched[what]
                yield facts | found | {"error": worst, "correct": worst < TOLERANCE[dtype]}
        except Exception as failed:  # a peer that cannot run gets a row that says so
            yield facts | {"what": "forward", "ms": None, "failed": f"{type(failed).__name__}: {failed}"[:200]}
