"""The minimum time of each layer at an H200's rates. TRITON_INTERPRET=1 python -m benchmarks.gpu_floors prints the
table."""

import functools
from collections.abc import Callable

import torch

from benchmarks.traffic import H200, as_launched, work
from fastgen import ops
from fastgen.ops import _tiers
from tests.cases import LARGE, ON_GPU, OpCase
from tests.support.observe import differentiable

LAYERS = [*LARGE, *ON_GPU]


def trained(call: Callable, inputs: dict[str, torch.Tensor]) -> object:
    """Forward and backward."""
    out = call(inputs)
    return torch.autograd.grad(out, [t for t in inputs.values() if t.requires_grad], torch.ones_like(out))


def modelled(call: Callable[[], object]) -> float:
    """The time at an H200's rates, in milliseconds, of all of Triton's launches for a call."""
    with _tiers.triton.kernels("_launch").recorded() as launches, ops.use_impl("triton"):
        call()
    return 1e3 * as_launched(launches, H200)


def as_modelled(case: OpCase, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """By pass."""
    with torch.no_grad():
        forward = modelled(functools.partial(case.call, inputs))
    return {"forward": forward, "forward + backward": modelled(functools.partial(trained, case.call, inputs))}


def floors() -> None:
    """Prints the floor of each layer, by its shapes and by the launches of Triton's kernels (in the interpreter)."""
    print(
        "| bfloat16, channels_last | forward, floor, ms | as launched | forward + backward, floor | as launched | "
        "measured |"
    )
    print("|---" * 6 + "|")
    for case in LAYERS:
        inputs = differentiable(case.tensors(torch.bfloat16, True))
        cells = []
        for what, launched in as_modelled(case, inputs).items():
            cells += [1e3 * work(case, torch.bfloat16, what != "forward").floor(H200, "16 bits"), launched]
        print(f"| {case.id}, {case.shapes['x'][0]} | {' | '.join(f'{ms:.4f}' for ms in cells)} | not yet |")


if __name__ == "__main__":
    floors()
