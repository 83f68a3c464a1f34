"""The gradient of a backward op: that of its formula in differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def differentiate(
    formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients that `grads` of formula(*inputs) give its inputs, differentiable in turn where gradients are recorded."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: only what the formula itself does with its inputs is differentiated here.
        inputs = [t.view_as(t) if t is not None else None for t in inputs]
        paths = [
            (out, grad)
            for out, grad in zip(formula(*inputs), grads, strict=True)
            if out.requires_grad and grad is not None
        ]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if paths and wanted:
            reached, incoming = zip(*paths, strict=True)
            found = iter(torch.autograd.grad(reached, wanted, incoming, create_graph=higher, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
