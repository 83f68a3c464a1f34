"""Turns what was recorded of a module into the steps of a plan."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.inference._readers import UnsupportedError
from fastgen.inference._record import Node, in_order, record
from fastgen.runtime._file import Size, Step


def lower(module: nn.Module, *inputs: Tensor) -> tuple[list[Step], tuple[int, ...], tuple[int, ...]]:
    """The steps of module(*inputs), and the shapes of an image of its first input and last output. Raises
    UnsupportedError."""
    for i, x in enumerate(inputs):
        is_image = x.dtype == torch.float32 and x.dim() in (2, 4)
        is_labels = x.dtype in (torch.int64, torch.int32) and x.dim() == 1
        if not (is_image or is_labels) or x.layout != torch.strided or len(x) != len(inputs[0]):
            layout = "" if x.layout == torch.strided else f" of layout {x.layout}"
            raise UnsupportedError(
                f"input {i} is {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{layout}, where plans take "
                f"float32 (N, C) "
                "and (N, C, H, W), and labels as int64 (N,)"
            )
    starts, outputs = record(module, *inputs)
    lowering = _Lowering(starts)
    for node in in_order(outputs):
        lowering.add(node)
    if len(lowering.steps) == len(inputs) - 1:
        raise UnsupportedError("it computes nothing")
    lowering.end(outputs)
    return lowering.steps, starts[0].shape, outputs[-1].shape


class _Lowering:
    def __init__(self, starts: list[Node]):
        self.steps: list[Step] = []
        self.values: dict[Node, int] = {starts[0]: 0}
        # How each value lies in memory: (h, w, c). Its elements in the order (c, h, w) are those of its nodes' shapes.
        self.sizes: list[Size] = [_size(starts[0].shape)]
        for start in starts[1:]:
            size = _size(start.shape)
            self.values[start] = self._raw("input", 0, size, size, kernel=(len(start.shape), 1))
        self.labels = {self.values[start] for start in starts if start.kind == "labels"}

    def end(self, outputs: list[Node]) -> None:
        """Makes steps of the outputs, unless there is one and the last step computes it."""
        for node in outputs:
            if len(node.shape) not in (0, 1, 3) or node.kind == "pad":
                raise UnsupportedError(f"its output is of shape (N, {', '.join(map(str, node.shape))})")
            if self.values[node] in self.labels:
                raise UnsupportedError("its output is labels")
        if len(outputs) == 1 and self.values[outputs[0]] == len(self.steps):
            shape, computed = outputs[0].shape, self.steps[-1].output
            if shape == computed if len(shape) == 3 else not self.lies_flat(outputs[0]):
                return
        for node in outputs:
            value = self.values[node]
            size = self.sizes[value] if len(node.shape) == 1 else _size(node.shape)
            self._raw("output", value, size, size, kernel=(len(node.shape), 1))

    def lies_flat(self, node: Node) -> bool:
        """Whether its elements lie in another order than its shape says: (c, h, w) of more than a pixel, flattened."""
        size = self.sizes[self.values[node]]
        return len(node.shape) == 1 and size[1] * size[2] > 1 and size[0] > 1

    def add(self, node: Node) -> None:
        if node.kind != "conv" and any(x.kind == "pad" for x in node.inputs):
            raise UnsupportedError(f"padding before {node.kind}")
        if node.kind not in ("embedding", "view") and any(self.values[x] in self.labels for x in node.inputs):
            raise UnsupportedError(f"{node.kind} of labels")
        if node.kind not in ("input", "labels"):
            getattr(self, f"_{node.kind}")(node, *node.inputs)

    def _step(self, node: Node, kind, x: Node, **options) -> None:
        if len(node.shape) not in (0, 1, 3):
            raise UnsupportedError(f"{node.kind} to a value of shape (N, {', '.join(map(str, node.shape))})")
        self.values[node] = self._raw(kind, self._upright(x), _size(x.shape), _size(node.shape), **options)

    def _raw(self, kind: str, value: int, input: Size, output: Size, **options) -> int:
        """The value of a new step."""
        self.steps.append(Step(kind, value, input, output, **options))
        self.sizes.append(output)
        return len(self.steps)

    def _upright(self, x: Node) -> int:
        """The value of x, in the order that its shape says."""
        if len(x.shape) not in (0, 1, 3):
            raise UnsupportedError(f"a value of shape (N, {', '.join(map(str, x.shape))})")
        if self.lies_flat(x):
            self.values[x] = self._raw("reshape", self.values[x], self.sizes[self.values[x]], _size(x.shape))
        return self.values[x]

    def _own(self, x: Node) -> Step | None:
        """The step that computes x, if nothing else reads x."""
        return self.steps[self.values[x] - 1] if self.values[x] > 0 and _is_read_once(x) else None

    def _last(self, x: Node) -> Step | None:
        """The step that computes x, if nothing else reads x and no activation ends it."""
        step = self._own(x)
        can = step is not None and step.kind in ("conv", "conv_transpose", "pointwise")
        return step if can and step.activation == "identity" else None  # type: ignore[union-attr]

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
        self.values[node] = self._raw(
            "conv", self.values[x], (c, h, w), _size(node.shape), kernel=(h, w), weight=array, bias=bias
        )

    def _view(self, node: Node, x: Node) -> None:
        if prod(node.shape) != prod(x.shape):
            raise UnsupportedError("a view that changes the batch")
        value = self.values[x]
        self.values[node] = value
        if len(node.shape) != 3:  # as it lies; who reads it turns it
            return
        node_size, lies = _size(node.shape), self.sizes[value]
        if node_size == lies or (node_size[0] == 1 and lies[1:] == (1, 1)):
            return
        step = self._own(x)
        if step is None or lies[1:] != (1, 1) or step.norm != "none" or step.residual >= 0 or step.kind != "conv":
            self.values[node] = self._raw("reshape", value, lies, node_size)
            return
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
        self._upright(a), self._upright(b)
        for x, other in ((a, b), (b, a)) if a.shape == b.shape else ():
            step = self._last(x)
            if step and step.residual < 0 and self.values[other] < self.values[x]:
                step.residual = self.values[other]
                self.values[node] = self.values[x]
                return
        self._combine(node, "add", a, b)

    def _mul(self, node: Node, a: Node, b: Node) -> None:
        self._combine(node, "mul", a, b)

    def _sub(self, node: Node, a: Node, b: Node) -> None:
        minus = Node("scale", (b,), b.shape, {"scale": -1.0, "shift": 0.0})
        self._scale(minus, b)
        self._combine(node, "add", a, minus)

    def _addcmul(self, node: Node, x: Node, a: Node, b: Node) -> None:
        product = Node("mul", (a, b), tuple(map(max, a.shape, b.shape)))
        self._combine(product, "mul", a, b)
        self._combine(node, "add", x, product)

    def _combine(self, node: Node, kind: str, a: Node, b: Node) -> None:
        """a + b or a * b, one of which has the result's shape, and the other one that, or 1 in its place."""
        if a.shape != node.shape:
            a, b = b, a
        if a.shape != node.shape or len(b.shape) != len(a.shape):
            raise UnsupportedError(f"{kind} of {a.shape} and {b.shape}")
        value, size = self._upright(b), _size(b.shape)
        if kind == "add" and size == _size(a.shape):
            return self._step(node, "pointwise", a, residual=value)
        self._step(node, kind, a, residual=value, groups=size[0], kernel=size[1:])

    def _resized(self, node: Node, x: Node) -> None:
        self._step(node, node.kind, x, **node.options)

    _upsample_nearest = _upsample_bilinear = _avg_pool = _max_pool = _resized

    def _pixel_shuffle(self, node: Node, x: Node) -> None:
        step = self._own(x)
        turned = False
        alone = step and step.kind == "conv" and step.norm == "none" and step.residual < 0 and step.groups == 1
        if step and alone and step.output == x.shape and step.weight is not None:
            # The convolution gives the channels in the order in which pixels are copied whole.
            factor = node.shape[1] // x.shape[1]
            rows = np.arange(x.shape[0]).reshape(-1, factor, factor).transpose(1, 2, 0).reshape(-1)
            step.weight = step.weight[rows]
            step.bias = step.bias[rows] if step.bias is not None else None
            turned = True
        self._step(node, "pixel_shuffle", x, reflect=turned)

    def _narrow(self, node: Node, x: Node) -> None:
        self._step(node, "narrow", x, padding=(node.options["start"], 0))

    def _embedding(self, node: Node, x: Node) -> None:
        weight = node.options["weight"]
        if self.values[x] not in self.labels:
            raise UnsupportedError("embedding of what is no input")
        options = {"kernel": (weight.shape[0], 1), "weight": _array(weight)}
        self.values[node] = self._raw("embedding", self.values[x], (1, 1, 1), (weight.shape[1], 1, 1), **options)

    def _reduction(self, node: Node, x: Node) -> None:
        c, h, w = _size(x.shape)
        count = h * w if node.options["over_pixels"] else c
        if not node.options["over_pixels"]:
            weight = np.full((1, c, 1, 1), 1 / count if node.options["is_mean"] else 1, np.float32)
            return self._step(node, "conv", x, weight=weight)
        if node.options["is_mean"]:
            return self._step(node, "avg_pool", x, kernel=(h, w), stride=(h, w))
        mean = Node("avg_pool", (x,), (c,))
        self._step(mean, "avg_pool", x, kernel=(h, w), stride=(h, w))
        self._scale(Node("scale", (mean,), node.shape, {"scale": float(count), "shift": 0.0}), mean)
        self.values[node] = len(self.steps)

    def _activation(self, node: Node, x: Node) -> None:
        step = self._last(x)
        if step is None:
            return self._step(node, "pointwise", x, **node.options)
        for name, value in node.options.items():
            setattr(step, name, value)
        self.values[node] = self.values[x]

    def _cat(self, node: Node, *parts: Node) -> None:
        values = [self._upright(part) for part in parts]
        whole, size = values[0], _size(parts[0].shape)
        for part, value in zip(parts[1:], values[1:], strict=True):
            joined = (size[0] + part.shape[0], size[1], size[2])
            whole, size = self._raw("concat", whole, size, joined, residual=value), joined
        self.values[node] = whole


def _is_read_once(x: Node) -> bool:
    while x.kind == "view" and x.uses == 1:
        x = x.inputs[0]
    return x.uses == 1


def _size(shape: tuple[int, ...]) -> Size:
    return (*shape, 1, 1, 1)[:3] if len(shape) < 2 else shape  # type: ignore[return-value]


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
