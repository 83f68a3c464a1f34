"""What a module computes for an example: the calls of PyTorch's functions on values that come from its input."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.inference._readers import ARITHMETIC, READERS, SAME, UnsupportedError
from fastgen.nn import Sequential


@dataclass(eq=False)
class Node:
    """A call: its kind, the nodes whose values it takes, its other arguments, and the shape of an image of its result."""

    kind: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    uses: int = 0


# What only looks, or gives the value back.
_QUIET = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_contiguous, Tensor.stride, Tensor.element_size, Tensor.is_floating_point,
    Tensor.data_ptr, Tensor.get_device, Tensor.__len__, Tensor.ndimension, torch.is_tensor, torch.is_floating_point,
}  # fmt: skip


class _Recorder(TorchFunctionMode):
    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.batch = inputs[0].shape[0]
        self.inputs = [Node("input" if x.is_floating_point() else "labels", (), tuple(x.shape[1:])) for x in inputs]
        # The tensor too: its id stays its own.
        self.known: dict[int, tuple[Tensor, Node]] = {id(x): (x, n) for x, n in zip(inputs, self.inputs, strict=True)}

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
        if func not in READERS:
            raise UnsupportedError(name)
        reader, known = READERS[func], args
        if reader in ARITHMETIC:  # a constant of one element is a number
            known = [float(a) if isinstance(a, Tensor) and a.numel() == 1 and not self.node(a) else a for a in args]
        try:
            kind, inputs, options = reader(*known, **kwargs)
        except TypeError:  # arguments that the reader does not know
            raise UnsupportedError(f"{name} with these arguments") from None
        nodes = tuple(self.node(value) for value in inputs)
        constants = [value for value in options.values() if isinstance(value, Tensor)]
        if any(node is None for node in nodes) or any(self.node(value) for value in constants):
            raise UnsupportedError(f"{name} of values and constants")
        old = self.node(args[0]) if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        if isinstance(result, tuple | list):
            for part in result:
                self._know(name, part, Node(kind, nodes, tuple(part.shape[1:]), dict(options)), involved)  # type: ignore[arg-type]
                options["start"] += part.shape[1]
            return result
        node = nodes[0] if kind == SAME else Node(kind, nodes, tuple(result.shape[1:]), options)  # type: ignore[arg-type]
        assert node is not None
        if old not in (None, node) and result is args[0]:  # in place: all that share the value see it
            for key, (tensor, value) in self.known.items():
                if tensor.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
                    if value is not old:
                        raise UnsupportedError(f"{name} in place on a view")
                    self.known[key] = (tensor, node)
        self._know(name, result, node, involved)
        return result

    def _know(self, name: str, result: Tensor, node: Node, involved: list[Tensor]) -> None:
        # Integers: labels, and what is chosen by them, until arithmetic makes them float32.
        are_integers = node.kind in ("labels", "embedding", "view") and result.dtype in (torch.int32, torch.int64)
        are_integers = are_integers and not any(value.is_floating_point() for value in involved)
        if (result.dtype != torch.float32 and not are_integers) or result.device.type != "cpu":
            raise UnsupportedError(f"{name} to {result.dtype} on {result.device}")
        if result.dim() < 1 or result.shape[0] != self.batch:
            raise UnsupportedError(f"{name} that changes the batch")
        self.known[id(result)] = (result, node)


@contextlib.contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """fastgen's layers call PyTorch's one by one."""
    fused = [m for m in module.modules() if type(m).forward is Sequential.forward and "forward" not in vars(m)]
    for m in fused:
        m.forward = functools.partial(nn.Sequential.forward, m)  # type: ignore[method-assign,arg-type]
    try:
        yield
    finally:
        for m in fused:
            del m.forward


def tensors(result: object) -> tuple[Tensor, ...]:
    """A model's output: a tensor, or a tuple or list of several. Raises UnsupportedError for others."""
    found = (result,) if isinstance(result, Tensor) else result
    if not isinstance(found, tuple | list) or (found is result and len(found) < 2):
        raise UnsupportedError(f"its output is a {type(result).__name__}, not a tensor or a tuple of several")
    if not all(isinstance(value, Tensor) for value in found):
        raise UnsupportedError(
            f"its output has parts of {', '.join(sorted({type(value).__name__ for value in found}))}"
        )
    return tuple(found)


def record(module: nn.Module, *inputs: Tensor) -> tuple[list[Node], list[Node]]:
    """(inputs, outputs) of module(*inputs). Raises UnsupportedError."""
    given = [x.clone() for x in inputs]
    recorder = _Recorder(given)
    with torch.no_grad(), unfused(module), recorder:
        result = module(*given)
    outputs: list[Node] = []
    for value in tensors(result):
        node = recorder.node(value)
        if node is None or value.dtype != torch.float32:
            raise UnsupportedError(
                "its output does not come from its input" if node is None else f"its output is {value.dtype}"
            )
        outputs.append(node)
    seen: set[int] = set()
    todo = list(outputs)
    for node in outputs:
        node.uses += 1
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            for before in node.inputs:
                before.uses += 1
                todo.append(before)
    return recorder.inputs, outputs


def in_order(outputs: list[Node]) -> list[Node]:
    """The nodes that the outputs need, each after those it takes."""
    order: list[Node] = []
    done: set[int] = set()
    todo: list[tuple[Node, bool]] = [(output, False) for output in reversed(outputs)]
    while todo:
        node, ready = todo.pop()
        if ready:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            todo.append((node, True))
            todo.extend((before, False) for before in reversed(node.inputs))
    return order
