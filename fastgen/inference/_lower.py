"""Turns a module's recorded calls into the steps of a plan."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.inference._readers import UnsupportedError
from fastgen.inference._record import Node, in_order, record
from fastgen.runtime._steps import (
    Activation,
    Add,
    AvgPool,
    Concat,
    Convolution,
    Embedding,
    Epilogue,
    Geometry,
    Input,
    Mul,
    Norm,
    NormAct,
    Output,
    PixelShuffle,
    Read,
    Reshape,
    Size,
    Step,
)


def lower(module: nn.Module, *inputs: Tensor) -> list[Step]:
    """The steps of module(*inputs). Raises UnsupportedError."""
    for i, x in enumerate(inputs):
        is_image = x.dtype == torch.float32 and x.dim() in (2, 4)
        is_labels = x.dtype in (torch.int64, torch.int32) and x.dim() == 1
        if not (is_image or is_labels) or x.layout != torch.strided or len(x) != len(inputs[0]):
            layout = "" if x.layout == torch.strided else f" of layout {x.layout}"
            raise UnsupportedError(
                f"input {i} is {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{layout}, but plans take "
                "float32 (N, C) and (N, C, H, W), and labels as int64 (N,)"
            )
    starts, outputs = record(module, *inputs)
    lowering = _Lowering(starts)
    for node in in_order(outputs):
        lowering.add(node)
    if len(lowering.steps) == len(inputs):
        raise UnsupportedError("it computes nothing")
    lowering.end(outputs)
    return lowering.steps


class _Lowering:
    """The method `_<kind>` adds the steps for nodes of that kind. Nodes whose kind is a class of steps become one
    step."""

    def __init__(self, starts: list[Node]):
        self.steps: list[Step] = []
        self.values: dict[Node, int] = {}
        # The size of each value in memory, whose order is (h, w, c). A node's elements are in the order of its shape.
        self.sizes: list[Size] = []
        for start in starts:
            self.values[start] = self._append(Input([], _size(start.shape), len(start.shape)))
        self.labels = {self.values[start] for start in starts if start.kind == "labels"}

    def end(self, outputs: list[Node]) -> None:
        for node in outputs:
            if len(node.shape) not in (0, 1, 3) or node.kind == "pad":
                raise UnsupportedError(f"its output has shape (N, {', '.join(map(str, node.shape))})")
            if self.values[node] in self.labels:
                raise UnsupportedError("its output is labels")
        for node in outputs:
            value = self.values[node]
            size = self.sizes[value] if len(node.shape) == 1 else _size(node.shape)
            self._append(Output([Read(value, size)], size, len(node.shape)))

    def add(self, node: Node) -> None:
        if node.kind != "conv" and any(x.kind == "pad" for x in node.inputs):
            raise UnsupportedError(f"padding before {node.name}")
        if node.kind not in ("embedding", "view") and any(self.values[x] in self.labels for x in node.inputs):
            raise UnsupportedError(f"{node.name} of labels")
        if not isinstance(node.kind, str):
            self._step(node, node.kind, *node.inputs, **node.options)
        elif node.kind not in ("input", "labels"):
            getattr(self, f"_{node.kind}")(node, *node.inputs)

    def _append(self, step: Step) -> int:
        """The value of a new step."""
        self.steps.append(step)
        self.sizes.append(step.size)
        return len(self.steps) - 1

    def _step(self, node: Node, kind: type[Step], *inputs: Node, **fields: Any) -> None:
        """Adds the node as a step that reads its inputs as images of their shapes."""
        if len(node.shape) not in (0, 1, 3):
            raise UnsupportedError(f"{node.name} to a value of shape (N, {', '.join(map(str, node.shape))})")
        reads = [self._read(x) for x in inputs]
        self.values[node] = self._append(kind(reads, _size(node.shape), **fields))

    def _read(self, x: Node) -> Read:
        """x in the element order of its shape: a flattened image is reordered."""
        if len(x.shape) not in (0, 1, 3):
            raise UnsupportedError(f"a value of shape (N, {', '.join(map(str, x.shape))})")
        if self._is_flattened(x):
            value, size = self.values[x], _size(x.shape)
            self.values[x] = self._append(Reshape([Read(value, self.sizes[value])], size))
        return Read(self.values[x], _size(x.shape))

    def _is_flattened(self, node: Node) -> bool:
        """Whether x's elements are in memory in the order (h, w, c) although its shape implies (c, h, w)."""
        size = self.sizes[self.values[node]]
        return len(node.shape) == 1 and size[1] * size[2] > 1 and size[0] > 1

    def _writer(self, x: Node) -> Step | None:
        """The step that computes x, if nothing else reads x."""
        return self.steps[self.values[x]] if _is_read_once(x) else None

    def _open_epilogue(self, x: Node) -> Convolution | NormAct | None:
        """The step that computes x, if nothing else reads x and its epilogue has no activation yet."""
        step = self._writer(x)
        if not isinstance(step, Convolution | NormAct) or step.epilogue.activation != Activation.identity:
            return None
        return step

    def _plain_convolution(self, x: Node) -> Convolution | None:
        """The step that computes x, if nothing else reads x and its output channels can be put in another order."""
        step = self._writer(x)
        if not isinstance(step, Convolution) or step.geometry.transposed or step.geometry.groups > 1:
            return None
        return step if _is_linear(step) else None

    def _conv(self, node: Node, x: Node) -> None:
        options = dict(node.options)
        weight, bias = options.pop("weight"), options.pop("bias")
        if x.kind == "pad":
            if options["padding"] != (0, 0):
                raise UnsupportedError("padding of a padded value")
            options |= x.options
            x = x.inputs[0]
        kernel = tuple(weight.shape[2:])
        geometry = Geometry(kernel, **options, transposed=node.kind == "conv_transpose")  # type: ignore[arg-type]
        self._step(node, Convolution, x, geometry=geometry, weight=_array(weight), bias=_array(bias))

    _conv_transpose = _conv

    def _pad(self, node: Node, x: Node) -> None:  # the convolutions that read the padded value do the padding
        self.values[node] = self.values[x]

    def _linear(self, node: Node, x: Node) -> None:
        if len(x.shape) != 1:
            raise UnsupportedError("linear on a value with more than 2 dimensions")
        size = self.sizes[self.values[x]] if self._is_flattened(x) else _size(x.shape)
        weight = node.options["weight"].reshape(-1, *size)
        self.values[node] = self._append(
            Convolution(
                [Read(self.values[x], size)], _size(node.shape), Geometry(size[1:]), _weights(weight),
                _array(node.options["bias"]),
            )
        )  # fmt: skip

    def _view(self, node: Node, x: Node) -> None:
        if prod(node.shape) != prod(x.shape):
            raise UnsupportedError("a view that changes the batch")
        value = self.values[x]
        self.values[node] = value
        if len(node.shape) != 3:  # as it is in memory; _read puts it in order
            return
        node_size, size = _size(node.shape), self.sizes[value]
        if node_size == size or (node_size[0] == 1 and size[1:] == (1, 1)):
            return
        step = self._plain_convolution(x)
        if step is None or size[1:] != (1, 1):
            self.values[node] = self._append(Reshape([Read(value, size)], node_size))
            return
        # (c, h, w) becomes (h, w, c) in the rows of the linear layer
        _reorder(step, np.arange(prod(node_size)).reshape(node_size).transpose(1, 2, 0).reshape(-1))
        self.sizes[value] = node_size

    def _norm(self, node: Node, x: Node) -> None:
        options: dict[str, Any] = {n: _array(v) if isinstance(v, Tensor) else v for n, v in node.options.items()}
        step = self._open_epilogue(x)
        same_channels = step is not None and step.size[0] == _size(node.shape)[0]
        if not isinstance(step, Convolution) or not same_channels or not _is_linear(step):
            return self._step(node, NormAct, x, epilogue=Epilogue(**options))
        epilogue = replace(step.epilogue, **options)
        if epilogue.norm == Norm.affine:
            _fold(step, epilogue)
        else:
            step.epilogue = epilogue
        self.values[node] = self.values[x]

    def _scale(self, node: Node, x: Node) -> None:
        scale, shift, zero, one = (
            np.full(_size(node.shape)[0], value, np.float32)
            for value in (node.options["scale"], node.options["shift"], 0, 1)
        )
        epilogue = Epilogue(Norm.affine, mean=zero, var=one, weight=scale, bias=shift, eps=0.0)
        self._step(node, NormAct, x, epilogue=epilogue)

    def _add(self, node: Node, a: Node, b: Node) -> None:
        reads = self._read(a), self._read(b)
        for x, other in ((a, reads[1]), (b, reads[0])) if a.shape == b.shape else ():
            step = self._open_epilogue(x)
            if step and len(step.inputs) == 1 and other.value < self.values[x]:
                step.inputs.append(Read(other.value, step.size))
                self.values[node] = self.values[x]
                return
        self._combine(node, Add, a, b)

    def _mul(self, node: Node, a: Node, b: Node) -> None:
        self._combine(node, Mul, a, b)

    def _sub(self, node: Node, a: Node, b: Node) -> None:
        minus = Node("scale", (b,), b.shape, {"scale": -1.0, "shift": 0.0})
        self._scale(minus, b)
        self._combine(node, Add, a, minus)

    def _addcmul(self, node: Node, x: Node, a: Node, b: Node) -> None:
        product = Node(Mul, (a, b), tuple(map(max, a.shape, b.shape)))
        self._combine(product, Mul, a, b)
        self._combine(node, Add, x, product)

    def _combine(self, node: Node, kind: type[Step], a: Node, b: Node) -> None:
        """a + b or a * b, where one operand has the result's shape, and each size of the other equals its size or
        is 1."""
        if a.shape != node.shape:
            a, b = b, a
        if a.shape != node.shape or len(b.shape) != len(a.shape):
            raise UnsupportedError(f"{kind.kind} of {a.shape} and {b.shape}")
        if kind is Add and _size(b.shape) == _size(a.shape):
            return self._step(node, NormAct, a, b, epilogue=Epilogue())
        self._step(node, kind, a, b)

    def _pixel_shuffle(self, node: Node, x: Node) -> None:
        step = self._plain_convolution(x)
        is_reordered = step is not None and step.size == x.shape
        if step is not None and is_reordered:  # its channels come in the order in which whole pixels are copied
            factor = node.shape[1] // x.shape[1]
            _reorder(step, np.arange(x.shape[0]).reshape(-1, factor, factor).transpose(1, 2, 0).reshape(-1))
        self._step(node, PixelShuffle, x, channels_last=is_reordered)

    def _embedding(self, node: Node, x: Node) -> None:
        weight = node.options["weight"]
        if self.values[x] not in self.labels:
            raise UnsupportedError("embedding of a value that is not an input")
        size = (weight.shape[1], 1, 1)
        step = Embedding([Read(self.values[x], (1, 1, 1))], size, weight.shape[0], _weights(weight))
        self.values[node] = self._append(step)

    def _reduction(self, node: Node, x: Node) -> None:
        c, h, w = _size(x.shape)
        if not node.options["over_pixels"]:
            weight = np.full((1, c, 1, 1), 1 / c if node.options["is_mean"] else 1, np.float32)
            return self._step(node, Convolution, x, geometry=Geometry((1, 1)), weight=weight)
        if node.options["is_mean"]:
            return self._step(node, AvgPool, x, kernel=(h, w), stride=(h, w))
        mean = Node(AvgPool, (x,), (c,))
        self._step(mean, AvgPool, x, kernel=(h, w), stride=(h, w))
        self._scale(Node("scale", (mean,), node.shape, {"scale": float(h * w), "shift": 0.0}), mean)
        self.values[node] = len(self.steps) - 1

    def _activation(self, node: Node, x: Node) -> None:
        step = self._open_epilogue(x)
        if step is None:
            return self._step(node, NormAct, x, epilogue=Epilogue(**node.options))
        step.epilogue = replace(step.epilogue, **node.options)
        self.values[node] = self.values[x]

    def _cat(self, node: Node, *parts: Node) -> None:
        if len(parts) > 1:
            return self._step(node, Concat, *parts)
        self.values[node] = self._read(parts[0]).value


def _is_linear(step: Convolution) -> bool:
    """Whether neither a norm nor a residual follows the convolution."""
    return step.epilogue.norm == Norm.none and len(step.inputs) == 1


def _is_read_once(x: Node) -> bool:
    while x.kind == "view" and x.uses == 1:
        x = x.inputs[0]
    return x.uses == 1


def _size(shape: tuple[int, ...]) -> Size:
    return (*shape, 1, 1, 1)[:3] if len(shape) < 2 else shape  # type: ignore[return-value]


def _weights(value: Tensor) -> np.ndarray:
    return value.detach().to(torch.float32).contiguous().numpy().copy()


def _array(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else _weights(value)


def _reorder(step: Convolution, channels: np.ndarray) -> None:
    step.weight = step.weight[channels]
    step.bias = step.bias[channels] if step.bias is not None else None


def _fold(step: Convolution, norm: Epilogue) -> None:
    """Folds the norm's fixed affine map into the weights and the bias, in float64."""
    assert norm.mean is not None and norm.var is not None
    scale = 1 / np.sqrt(norm.var.astype(np.float64) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.mean.astype(np.float64) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    if step.bias is not None:
        shift = shift + step.bias * scale
    if not step.geometry.transposed:
        folded = step.weight * scale[:, None, None, None]
    else:  # (ic, c / groups, kh, kw)
        ic, channels = step.weight.shape[:2]
        groups = step.geometry.groups
        per_input = scale.reshape(groups, 1, channels).repeat(ic // groups, 1).reshape(ic, channels)
        folded = step.weight * per_input[:, :, None, None]
    step.weight, step.bias = folded.astype(np.float32), shift.astype(np.float32)
