"""Turns what was recorded of a module into the steps of a plan."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.inference._record import Node, UnsupportedError, in_order, record
from fastgen.runtime._file import Size, Step


def lower(module: nn.Module, x: Tensor) -> tuple[list[Step], tuple[int, ...], tuple[int, ...]]:
    """The steps of module(x), and the shapes of an image of its input and output. Raises UnsupportedError."""
    if x.dim() not in (2, 4):
        raise UnsupportedError(f"its input has {x.dim()} dimensions")
    start, output = record(module, x)
    lowering = _Lowering(start)
    for node in in_order(output):
        lowering.add(node)
    value = lowering.values[output]
    if not lowering.steps:
        raise UnsupportedError("it computes nothing")
    if value != len(lowering.steps):
        raise UnsupportedError("its output is not what it computes last")
    if len(output.shape) not in (1, 3) or lowering.lies_flat(output):
        raise UnsupportedError(f"its output is of shape (N, {', '.join(map(str, output.shape))})")
    return lowering.steps, start.shape, output.shape


class _Lowering:
    def __init__(self, start: Node):
        self.steps: list[Step] = []
        self.values: dict[Node, int] = {start: 0}
        self.sizes: list[Size] = [_size(start.shape)]  # how each value lies in memory: (h, w, c)

    def lies_flat(self, node: Node) -> bool:
        """Whether its elements lie in another order than its shape says: (c, h, w) of more than a pixel, flattened."""
        size = self.sizes[self.values[node]]
        return len(node.shape) == 1 and size[1] * size[2] > 1 and size[0] > 1

    def add(self, node: Node) -> None:
        if node.kind != "conv" and any(x.kind == "pad" for x in node.inputs):
            raise UnsupportedError(f"padding before {node.kind}")
        if node.kind != "input":
            getattr(self, f"_{node.kind}")(node, *node.inputs)

    def _step(self, node: Node, kind, x: Node, **options) -> None:
        if self.lies_flat(x) or len(x.shape) not in (1, 3) or len(node.shape) not in (1, 3):
            raise UnsupportedError(f"{node.kind} of a value of shape (N, {', '.join(map(str, x.shape))})")
        self.steps.append(Step(kind, self.values[x], _size(x.shape), _size(node.shape), **options))
        self._put(node)

    def _put(self, node: Node) -> None:
        self.values[node] = len(self.steps)
        self.sizes.append(self.steps[-1].output)

    def _last(self, x: Node) -> Step | None:
        """The step that computes x, if nothing else reads x and no activation ends it."""
        value = self.values[x]
        alone = value > 0 and _is_read_once(x)
        step = self.steps[value - 1]
        return step if alone and step.activation == "identity" and step.kind != "concat" else None

    def _conv(self, node: Node, x: Node) -> None:
        options = dict(node.options)
        weight, bias = options.pop("weight"), options.pop("bias")
        if x.kind == "pad":
            if options["padding"] != (0, 0):
                raise UnsupportedError("padding of what is padded")
            options |= x.options
            x = x.inputs[0]
        kernel = tuple(weight.shape[2:])
        self._step(node, node.kind, x, kernel=kernel, weight=_array(weight), bias=_array(bias), **options)

    _conv_transpose = _conv

    def _pad(self, node: Node, x: Node) -> None:  # the convolutions behind it take it in
        self.values[node] = self.values[x]

    def _linear(self, node: Node, x: Node) -> None:
        if len(x.shape) != 1:
            raise UnsupportedError("linear on more than vectors")
        weight, bias = node.options["weight"], _array(node.options["bias"])
        c, h, w = self.sizes[self.values[x]] if self.lies_flat(x) else (x.shape[0], 1, 1)
        array = _array(weight.reshape(weight.shape[0], c, h, w))
        self.steps.append(
            Step("conv", self.values[x], (c, h, w), _size(node.shape), kernel=(h, w), weight=array, bias=bias)
        )
        self._put(node)

    def _view(self, node: Node, x: Node) -> None:
        if prod(node.shape) != prod(x.shape):
            raise UnsupportedError("a view that changes the batch")
        value = self.values[x]
        self.values[node] = value
        node_size, lies = _size(node.shape), self.sizes[value]
        if len(node.shape) == 1 or node_size == lies or (node_size[0] == 1 and lies[1:] == (1, 1)):
            return
        step = self.steps[value - 1] if value > 0 and _is_read_once(x) else None
        if step is None or lies[1:] != (1, 1) or step.norm != "none" or step.residual >= 0 or step.kind != "conv":
            raise UnsupportedError(
                f"a view of (N, {', '.join(map(str, x.shape))}) as (N, {', '.join(map(str, node.shape))})"
            )
        # (c, h, w) becomes (h, w, c) in the rows of the linear layer
        rows = np.arange(prod(node_size)).reshape(node_size).transpose(1, 2, 0).reshape(-1)
        assert step.weight is not None
        step.weight = step.weight[rows]
        step.bias = step.bias[rows] if step.bias is not None else None
        self.sizes[value] = node_size

    def _norm(self, node: Node, x: Node) -> None:
        options: dict[str, Any] = {n: _array(v) if isinstance(v, Tensor) else v for n, v in node.options.items()}
        step = self._last(x)
        c = _size(node.shape)[0]
        fits = step is not None and step.kind != "pointwise" and step.norm == "none" and step.residual < 0
        if step is None or not fits or step.output[0] != c:
            return self._step(node, "pointwise", x, **options)
        if options["norm"] == "affine":
            _fold(step, options["mean"], options["var"], options["norm_weight"], options["norm_bias"], options["eps"])
        else:
            for name, value in options.items():
                setattr(step, name, value)
        self.values[node] = self.values[x]

    def _scale(self, node: Node, x: Node) -> None:
        c = _size(node.shape)[0]
        filled = {name: np.full(c, node.options[name], np.float32) for name in ("scale", "shift")}
        given = {"mean": np.zeros(c, np.float32), "var": np.ones(c, np.float32), "eps": 0.0}
        self._step(node, "pointwise", x, norm="affine", norm_weight=filled["scale"], norm_bias=filled["shift"], **given)

    def _add(self, node: Node, a: Node, b: Node) -> None:
        if self.lies_flat(a) or self.lies_flat(b):
            raise UnsupportedError("a sum of flattened values")
        for x, other in ((a, b), (b, a)):
            step = self._last(x)
            if step and step.residual < 0 and self.values[other] < self.values[x]:
                step.residual = self.values[other]
                self.values[node] = self.values[x]
                return
        self._step(node, "pointwise", a, residual=self.values[b])

    def _activation(self, node: Node, x: Node) -> None:
        step = self._last(x)
        if step is None:
            return self._step(node, "pointwise", x, **node.options)
        for name, value in node.options.items():
            setattr(step, name, value)
        self.values[node] = self.values[x]

    def _cat(self, node: Node, *parts: Node) -> None:
        whole, size = self.values[parts[0]], _size(parts[0].shape)
        for part in parts[1:]:
            if self.lies_flat(part) or len(part.shape) != 3:
                raise UnsupportedError("cat of vectors")
            joined = (size[0] + part.shape[0], size[1], size[2])
            self.steps.append(Step("concat", whole, size, joined, residual=self.values[part]))
            self._put(node)
            whole, size = self.values[node], joined


def _is_read_once(x: Node) -> bool:
    while x.kind == "view" and x.uses == 1:
        x = x.inputs[0]
    return x.uses == 1


def _size(shape: tuple[int, ...]) -> Size:
    return (shape[0], 1, 1) if len(shape) == 1 else shape  # type: ignore[return-value]


def _array(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else value.detach().to(torch.float32).contiguous().numpy().copy()


def _fold(step: Step, mean, var, norm_weight, norm_bias, eps: float) -> None:
    """The norm's fixed affine map, in the weights and the bias. In float64."""
    assert step.weight is not None
    scale = 1 / np.sqrt(var.astype(np.float64) + eps)
    if norm_weight is not None:
        scale = scale * norm_weight
    shift = -mean.astype(np.float64) * scale
    if norm_bias is not None:
        shift = shift + norm_bias
    if step.bias is not None:
        shift = shift + step.bias * scale
    if step.kind == "conv":
        folded = step.weight * scale[:, None, None, None]
    else:  # (ic, c / groups, kh, kw)
        ic, channels = step.weight.shape[:2]
        per_input = scale.reshape(step.groups, 1, channels).repeat(ic // step.groups, 1).reshape(ic, channels)
        folded = step.weight * per_input[:, :, None, None]
    step.weight, step.bias = folded.astype(np.float32), shift.astype(np.float32)
