"""explain(model, inputs): which implementation computes each layer of a model, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.inference._fuse import fuse
from fastgen.inference._report import fusion_report
from fastgen.inference._sandbox import copy_inputs, preserved_rng
from fastgen.nn._run import Call, geometry_of, recorded_calls, weight_shape
from fastgen.ops import _dispatch, _policy, _tiers
from fastgen.ops._layout import TensorSpec, is_channels_last
from fastgen.ops._question import Choice
from fastgen.ops._requested import requested_impl

_NOTHING = (
    "nothing to explain: the call ran no layers that fastgen's ops can compute "
    "(a convolution, or a norm followed by an activation)"
)


@dataclass(frozen=True)
class Explained:
    """The implementation of one pass of a layer."""

    layer: str  # the modules' names in the model
    what: str  # "forward", "input_grad" or "weight_grad"
    choice: Choice


@dataclass(frozen=True)
class Explanation:
    """The passes of a model's layers in the order of their calls. str() of it is a table; a sentence if it is empty."""

    rows: tuple[Explained, ...]

    def __str__(self) -> str:
        if not self.rows:
            return _NOTHING
        cells = [("layer", "pass", "computed by", "because")]
        cells += [(row.layer, row.what, str(row.choice), row.choice.reason) for row in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        return "\n".join(
            "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells
        )


def explain(model: nn.Module, *example_inputs: Any, training: bool = True) -> Explanation:
    """Tells which implementation computes each layer of fuse(model) on these inputs, and why.

    A fused copy of the model runs once on copies of the inputs, and the random number generators are restored: nothing
    is changed. "computed by" is one of fastgen's kernels (cpp, cuda, triton), the op in plain PyTorch (reference),
    PyTorch's convolution followed by fastgen's norm_act (unfused), PyTorch's modules one by one (modules), or, for a
    gradient, PyTorch's kernel (torch). The reason names the rule of fastgen/ops/_rules.py, or the measured times.

    Args:
        model: any module, on the device that it will run on.
        example_inputs: the inputs that it is called with. An active autocast applies.
        training: run in training mode, and explain the gradients of each layer's input and weight too.

    Raises TypeError if model is not an nn.Module.
    """
    network = fuse(model).train(training)
    names = {module: name or "model" for name, module in network.named_modules()}
    with preserved_rng(), torch.set_grad_enabled(training), recorded_calls() as calls:
        network(*copy_inputs(example_inputs))
    rows = [Explained(_name(call, names), *passed) for call in calls for passed in _passes(call, training)]
    explained = {module for call in calls for module in call.layers}
    for left in fusion_report(network).left:
        module = network.get_submodule(left.name) if left.name else network
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in explained:
            rows.append(Explained(left.name or "model", "forward", Choice("modules", "", left.reason)))
    return Explanation(tuple(rows))


def _name(call: Call, names: dict[nn.Module, str]) -> str:
    return " + ".join(names.get(module, type(module).__name__) for module in call.layers if module is not None)


def _passes(call: Call, training: bool) -> Iterator[tuple[str, Choice]]:
    convolution, norm, _ = call.layers
    if call.modules is not None:
        yield "forward", call.modules
        return
    x, dtype = call.x, call.x.dtype
    if torch.is_autocast_enabled(x.device.type) and convolution is not None:
        dtype = torch.get_autocast_dtype(x.device.type)
    like = torch.empty(0, dtype=dtype, device=x.device)
    if convolution is None:
        yield "forward", _of_op("norm_act", like, None)
        return
    geometry = geometry_of(convolution)  # type: ignore[arg-type]
    weight = TensorSpec(weight_shape(convolution), dtype, x.device, _weight_is_channels_last(convolution))
    batch_stats = norm is not None and (norm.training or getattr(norm, "running_mean", None) is None)
    fastest = _policy.fastest_forward(geometry, x.shape, weight, batch_stats)
    yield "forward", _of_op(geometry.fused()[0], like, fastest)
    if training and _dispatch.has_kernels(like):
        if call.wants_input_grad:
            yield "input_grad", _policy.fastest_input_grad(geometry, x.shape, weight)
        last = x.channels_last or weight.channels_last
        yield "weight_grad", _policy.fastest_weight_grad(geometry, x.shape, weight, last)


def _weight_is_channels_last(convolution: Any) -> bool:
    found = convolution._parameters.get("weight")
    if found is None and "weight" in getattr(convolution, "parametrizations", {}):
        found = convolution.parametrizations.weight.original
    return isinstance(found, Tensor) and is_channels_last(found)


def _of_op(op: str, like: Tensor, fastest: Choice | None) -> Choice:
    chosen = _dispatch.choose(op, "auto", like, fastest, counted=False)
    if (requested := requested_impl()) != "auto":
        return chosen._replace(reason=f"{requested} is requested")
    if chosen.implementation == "reference":
        tier = _policy.auto_tier(op, str(like.device), like.dtype)
        reason = _tiers.why_not(op, tier, str(like.device), like.dtype) if tier else None
        return chosen._replace(reason=reason or f"fastgen has no kernels for {like.device}")
    reason = fastest.reason if fastest is not None else "the norm and the activation take one pass"
    return chosen._replace(reason=reason)
