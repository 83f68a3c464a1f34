"""The results of one call of a public op: outputs, gradients, running statistics."""

import pytest
import torch
from torch import Tensor

from tests.cases import OpCase

OUTPUTS = {"reparameterize_kl": ("z", "kl"), "spectral_norm": ("out", "sigma", "u", "v")}  # the other ops have only out
STATE = ("running_mean", "running_var", "u", "v")  # arguments that have no gradient


def by_id(cases: list[OpCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def differentiable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.requires_grad_(name not in STATE) for name, t in tensors.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies as leaves, with the same values and memory formats."""
    copies = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in tensors.items()}
    return differentiable(copies)


def observe(case: OpCase, tensors: dict[str, Tensor], upstream: Tensor | None, impl: str) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of one call on copies of the tensors; a sampler's noise has seed 0.

    upstream: the gradient of the only output. None: random values, the same for each implementation and dtype.
    """
    tensors = copied(tensors)
    torch.manual_seed(0)
    outputs = case.call(tensors, impl=impl)
    outputs = dict(
        zip(OUTPUTS.get(case.op, ("out",)), outputs if isinstance(outputs, tuple) else [outputs], strict=True)
    )
    differentiated = [t for t in outputs.values() if t.requires_grad]
    upstreams = [random_like(t) if upstream is None else upstream.to(t.dtype) for t in differentiated]
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(differentiated, list(leaves.values()), upstreams)
    seen = {name: t.detach() for name, t in outputs.items()}
    seen |= {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return seen | {name: t for name, t in tensors.items() if name.startswith("running")}


def random_like(t: Tensor) -> Tensor:
    """Normal values that depend only on the shape, not on device, dtype or earlier draws."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t)
