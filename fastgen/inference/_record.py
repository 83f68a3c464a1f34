"""What a module computes for an example: the calls of PyTorch's functions on values that come from its input."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.nn import Sequential


class UnsupportedError(Exception):
    """The module computes something that a plan cannot."""


@dataclass(eq=False)
class Node:
    """A call: its kind, the nodes whose values it takes, its other arguments, and the shape of an image of its result."""

    kind: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    uses: int = 0


_SAME = "same"
# What only looks, or gives the value back.
_QUIET = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_contiguous, Tensor.stride, Tensor.element_size, Tensor.is_floating_point,
    Tensor.data_ptr, Tensor.get_device, Tensor.ndimension, torch.is_tensor, torch.is_floating_point,
}  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]  # type: ignore[return-value]


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        raise UnsupportedError(f"conv2d with padding={padding!r}")
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return "conv", (input,), {"weight": weight, "bias": bias, **options}


def _conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return "conv_transpose", (input,), {"weight": weight, "bias": bias, **options}


def _linear(input, weight, bias=None):
    return "linear", (input,), {"weight": weight, "bias": bias}


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    given = {"mean": None, "var": None} if training else {"mean": running_mean, "var": running_var}
    norm = "batch" if training else "affine"
    return "norm", (input,), {"norm": norm, **given, "norm_weight": weight, "norm_bias": bias, "eps": eps}


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    given = {"mean": None, "var": None} if use_input_stats else {"mean": running_mean, "var": running_var}
    norm = "instance" if use_input_stats else "affine"
    return "norm", (input,), {"norm": norm, **given, "norm_weight": weight, "norm_bias": bias, "eps": eps}


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    options = {"mean": None, "var": None, "norm_weight": weight, "norm_bias": bias, "eps": eps}
    return "norm", (input,), {"norm": "group", "num_groups": num_groups, **options}


def _activation(name: str) -> Callable:
    def read(input, *_, **__):
        return "activation", (input,), {"activation": name}

    return read


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return "activation", (input,), {"activation": "leaky_relu", "negative_slope": negative_slope}


def _pad(input, pad, mode="constant", value=None):
    pad = list(pad) + [0, 0] * (2 - len(pad) // 2)
    symmetric = len(pad) == 4 and pad[0] == pad[1] >= 0 and pad[2] == pad[3] >= 0
    if mode not in ("constant", "reflect") or (mode == "constant" and value not in (None, 0, 0.0)) or not symmetric:
        raise UnsupportedError(f"pad with {tuple(pad)}, mode={mode!r}")
    return "pad", (input,), {"padding": (pad[2], pad[0]), "reflect": mode == "reflect"}


def _cat(tensors, dim=0):
    if dim not in (1, 1 - tensors[0].dim()):
        raise UnsupportedError(f"cat along dimension {dim}")
    return "cat", tuple(tensors), {}


def _dropout(input, p=0.5, training=True, inplace=False):
    if training:
        raise UnsupportedError("dropout that is on")
    return _SAME, (input,), {}


def _same(input, *_, **__):
    return _SAME, (input,), {}


def _view(input, *_, **__):
    return "view", (input,), {}


def _arithmetic(scale_of: Callable, shift_of: Callable) -> Callable:
    def read(a, b, alpha=1, **_):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and scale_of is _one and a.shape == b.shape and alpha == 1:
            return "add", (a, b), {}
        x, number = (b, a) if isinstance(b, Tensor) else (a, b)
        if not isinstance(number, int | float) or (number is a and not scale_of(1)):
            raise UnsupportedError("arithmetic between tensors")
        return "scale", (x,), {"scale": float(scale_of(number)), "shift": float(shift_of(number * alpha))}

    return read


def _one(_: float) -> float:
    return 1.0


def _sub(a, b, alpha=1):
    if not isinstance(b, int | float):
        raise UnsupportedError("a difference of tensors")
    return "scale", (a,), {"scale": 1.0, "shift": -float(b) * alpha}


def _div(a, b, rounding_mode=None):
    if not isinstance(b, int | float) or rounding_mode:
        raise UnsupportedError("a quotient of tensors")
    return "scale", (a,), {"scale": 1.0 / b, "shift": 0.0}


def _neg(a):
    return "scale", (a,), {"scale": -1.0, "shift": 0.0}


_add = _arithmetic(_one, float)
_mul = _arithmetic(float, lambda number: 0.0)
_READERS: dict[Any, Callable] = {
    F.conv2d: _conv2d, torch.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d, F.linear: _linear,
    F.batch_norm: _batch_norm, F.instance_norm: _instance_norm, F.group_norm: _group_norm,
    F.relu: _activation("relu"), F.relu_: _activation("relu"), torch.relu: _activation("relu"),
    torch.relu_: _activation("relu"), Tensor.relu: _activation("relu"), Tensor.relu_: _activation("relu"),
    F.leaky_relu: _leaky_relu, F.leaky_relu_: _leaky_relu,
    F.tanh: _activation("tanh"), torch.tanh: _activation("tanh"), Tensor.tanh: _activation("tanh"),
    F.sigmoid: _activation("sigmoid"), torch.sigmoid: _activation("sigmoid"), Tensor.sigmoid: _activation("sigmoid"),
    F.silu: _activation("silu"),
    F.pad: _pad, torch.cat: _cat, F.dropout: _dropout, F.dropout2d: _dropout, F.alpha_dropout: _dropout,
    Tensor.contiguous: _same, Tensor.clone: _same, torch.clone: _same, Tensor.detach: _same,
    Tensor.to: _same, Tensor.float: _same,
    Tensor.type_as: _same,
    Tensor.view: _view, Tensor.reshape: _view, torch.reshape: _view, Tensor.flatten: _view, torch.flatten: _view,
    Tensor.squeeze: _view, torch.squeeze: _view, Tensor.unsqueeze: _view, torch.unsqueeze: _view, Tensor.unflatten: _view,
    torch.add: _add, Tensor.add: _add, Tensor.add_: _add, operator.add: _add, Tensor.__add__: _add, Tensor.__radd__: _add,
    Tensor.__iadd__: _add, torch.mul: _mul, Tensor.mul: _mul, Tensor.__mul__: _mul, Tensor.__rmul__: _mul,
    torch.sub: _sub, Tensor.sub: _sub, Tensor.__sub__: _sub, torch.div: _div, Tensor.div: _div, Tensor.__truediv__: _div,
    torch.neg: _neg, Tensor.neg: _neg, Tensor.__neg__: _neg,
}  # fmt: skip


class _Recorder(TorchFunctionMode):
    def __init__(self, x: Tensor):
        super().__init__()
        self.batch = x.shape[0]
        self.input = Node("input", (), tuple(x.shape[1:]))
        self.known: dict[int, tuple[Tensor, Node]] = {id(x): (x, self.input)}  # the tensor too: its id stays its own

    def node(self, value: Any) -> Node | None:
        return self.known[id(value)][1] if id(value) in self.known else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        involved = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self.node(leaf)]
        if not involved or func in _QUIET or getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if involved and isinstance(result, Tensor):  # such as .T or .data
                raise UnsupportedError("an attribute of a value that is computed")
            return result
        name = getattr(func, "__name__", str(func))
        if func not in _READERS:
            raise UnsupportedError(name)
        kind, inputs, options = _READERS[func](*args, **kwargs)
        nodes = tuple(self.node(value) for value in inputs)
        constants = [value for value in options.values() if isinstance(value, Tensor)]
        if any(node is None for node in nodes) or any(self.node(value) for value in constants):
            raise UnsupportedError(f"{name} of values and constants")
        old = self.node(args[0]) if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        if result.dtype != torch.float32 or result.device.type != "cpu":
            raise UnsupportedError(f"{name} to {result.dtype} on {result.device}")
        if result.dim() < 2 or result.shape[0] != self.batch:
            raise UnsupportedError(f"{name} that changes the batch")
        node = nodes[0] if kind == _SAME else Node(kind, nodes, tuple(result.shape[1:]), options)  # type: ignore[arg-type]
        assert node is not None
        if old is not None and result is args[0]:  # in place: all that share the value see it
            for key, (tensor, value) in self.known.items():
                if tensor.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
                    if value is not old:
                        raise UnsupportedError(f"{name} in place on a view")
                    self.known[key] = (tensor, node)
        self.known[id(result)] = (result, node)
        return result


@contextlib.contextmanager
def _unfused(module: nn.Module) -> Iterator[None]:
    """fastgen's layers call PyTorch's one by one."""
    fused = [m for m in module.modules() if type(m).forward is Sequential.forward and "forward" not in vars(m)]
    for m in fused:
        m.forward = functools.partial(nn.Sequential.forward, m)  # type: ignore[method-assign,arg-type]
    try:
        yield
    finally:
        for m in fused:
            del m.forward


def record(module: nn.Module, x: Tensor) -> tuple[Node, Node]:
    """(input, output) of module(x), which must be one tensor. Raises UnsupportedError."""
    recorder = _Recorder(x)
    with torch.no_grad(), _unfused(module), recorder:
        result = module(x)
    output = recorder.node(result) if isinstance(result, Tensor) else None
    if output is None:
        raise UnsupportedError("its output is not one tensor that comes from its input")
    seen: set[int] = set()
    todo = [output]
    output.uses += 1
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            for before in node.inputs:
                before.uses += 1
                todo.append(before)
    return recorder.input, output


def in_order(output: Node) -> list[Node]:
    """The nodes that the output needs, each after those it takes."""
    order: list[Node] = []
    done: set[int] = set()
    todo: list[tuple[Node, bool]] = [(output, False)]
    while todo:
        node, ready = todo.pop()
        if ready:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            todo.append((node, True))
            todo.extend((before, False) for before in reversed(node.inputs))
    return order
