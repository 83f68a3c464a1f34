"""Records what a module computes for an example: the calls of PyTorch's functions on values that depend on its input.

A plan accepts any batch size. A forward that reads the batch size therefore runs again for other batch sizes, on meta
tensors, and must call the same functions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastgen.inference._readers import ARITHMETIC, READERS, SAME, UnsupportedError, first_line
from fastgen.nn import Sequential
from fastgen.runtime._steps import Step


@dataclass(eq=False)
class Node:
    """A call: its kind, the nodes that it reads, its other arguments, and its result's shape without the batch."""

    kind: str | type[Step]
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    uses: int = 0

    @property
    def name(self) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind.kind


# Functions that compute nothing, such as queries of a shape.
_QUIET = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_contiguous, Tensor.stride, Tensor.element_size,
    Tensor.is_floating_point, Tensor.data_ptr, Tensor.get_device, Tensor.__len__, Tensor.ndimension, torch.is_tensor,
    torch.is_floating_point,
}  # fmt: skip


# Batch sizes to try, since a forward may compute something else for small or large ones.
_NUMBERS = (*range(1, 18), 24, 25, *(2**k + i for k in (5, 6, 7, 8, 9, 10) for i in (-1, 0, 1)), 100, 1000)


class _Call(NamedTuple):
    """A recorded call. results: each result's node, its dtype, and what it shares with the first argument."""

    reads: tuple[str | type[Step], tuple[Node, ...], dict[str, Any]]
    results: list[tuple[Node, torch.dtype, Literal["", "memory", "all"]]]
    is_one: bool


class _Recorder(TorchFunctionMode):
    """Records the calls, and whether the batch size was read."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.batch = inputs[0].shape[0]
        self.reads_batch_size = False
        self.calls: list[_Call] = []
        self.inputs = [Node("input" if x.is_floating_point() else "labels", (), tuple(x.shape[1:])) for x in inputs]
        # The tensor is kept too, so that no other one gets its id.
        self.nodes_by_id: dict[int, tuple[Tensor, Node]] = {
            id(x): (x, n) for x, n in zip(inputs, self.inputs, strict=True)
        }

    def node(self, value: Any) -> Node | None:
        return self.nodes_by_id[id(value)][1] if id(value) in self.nodes_by_id else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        involved = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self.node(leaf)]
        if not involved or func in _QUIET or getattr(func, "__name__", "") == "__get__":
            self.reads_batch_size = self.reads_batch_size or (bool(involved) and _tells_batch(func, *args, **kwargs))
            result = func(*args, **kwargs)
            if involved and isinstance(result, Tensor):  # such as .T or .data
                raise UnsupportedError("an attribute of a computed value")
            return result
        name = getattr(func, "__name__", str(func))
        if func not in READERS:
            raise UnsupportedError(name)
        reader, arguments = READERS[func], args
        if reader in ARITHMETIC:  # a constant tensor of one element counts as a number
            arguments = [float(a) if isinstance(a, Tensor) and a.numel() == 1 and not self.node(a) else a for a in args]
        try:
            kind, inputs, options = reader(*arguments, **kwargs)
        except TypeError:  # the reader does not have these parameters
            raise UnsupportedError(f"{name} with these arguments") from None
        nodes = tuple(self.node(value) for value in inputs)
        constants = [value for value in options.values() if isinstance(value, Tensor)]
        if any(node is None for node in nodes) or any(self.node(value) for value in constants):
            raise UnsupportedError(f"{name} of values and constants")
        first = args[0] if args else None
        old = self.node(first) if isinstance(first, Tensor) else None
        reads = (kind, cast(tuple[Node, ...], nodes), options)
        result, nodes_made = self._run(functools.partial(func, *args, **kwargs), first, reads)
        for value, node in zip([result] if isinstance(result, Tensor) else result, nodes_made, strict=True):
            if old not in (None, node) and value is first:  # in place: all that share the value see it
                for key, (tensor, known_node) in self.nodes_by_id.items():
                    if _share_memory(tensor, value):
                        if known_node is not old:
                            raise UnsupportedError(f"{name} in place on a view")
                        self.nodes_by_id[key] = (tensor, node)
            self._know(name, value, node, involved)
        return result

    def _run(self, call: Callable, first: Any, reads: tuple) -> tuple[Any, list[Node]]:
        """The result of the call, and the node of each tensor in it."""
        result = call()
        kind, nodes, options = reads
        results: list[Any] = []
        start = options.get("start", 0)
        for value in [result] if isinstance(result, Tensor) else result:
            its_options = options if isinstance(result, Tensor) else {**options, "start": start}
            node = nodes[0] if kind == SAME else Node(kind, nodes, tuple(value.shape[1:]), its_options)
            shares = isinstance(first, Tensor) and _share_memory(first, value)
            results.append((node, value.dtype, "all" if value is first else "memory" if shares else ""))
            start += value.shape[1] if value.dim() > 1 else 0
        self.calls.append(_Call(reads, results, isinstance(result, Tensor)))
        return result, [node for node, *_ in results]

    def _know(self, name: str, result: Tensor, node: Node, involved: list[Tensor]) -> None:
        # Labels, and rows that they select, may be integers until arithmetic makes them float32.
        are_integers = node.kind in ("labels", "embedding", "view") and result.dtype in (torch.int32, torch.int64)
        are_integers = are_integers and not any(value.is_floating_point() for value in involved)
        if (result.dtype != torch.float32 and not are_integers) or result.device.type != "cpu":
            raise UnsupportedError(f"{name} to {result.dtype} on {result.device}")
        if result.dim() < 1 or result.shape[0] != self.batch:
            raise UnsupportedError(f"{name} that changes the batch")
        self.nodes_by_id[id(result)] = (result, node)


class _OtherCallError(Exception):
    """A forward does not call the recorded functions."""


class _Replay(_Recorder):
    """Compares the calls with those that were recorded for another batch size. Nothing is computed: results have the
    right shapes, but no memory."""

    def __init__(self, inputs: list[Tensor], recorded: _Recorder):
        super().__init__(inputs)
        self.nodes_by_id = {id(x): (x, node) for x, node in zip(inputs, recorded.inputs, strict=True)}
        self.expected, self.at = recorded.calls, 0

    def _run(self, call: Callable, first: Any, reads: tuple) -> tuple[Any, list[Node]]:
        if self.at == len(self.expected):
            raise _OtherCallError
        expected = self.expected[self.at]
        self.at += 1
        (kind, nodes, options), before = reads, expected.reads[2]
        if (kind, nodes, options.keys()) != (*expected.reads[:2], before.keys()):
            raise _OtherCallError
        if not all(_are_equal(options[name], before[name]) for name in options):
            raise _OtherCallError
        made = [node for node, *_ in expected.results]
        if kind == "view":  # its arguments are not in the node
            result = call()
            if result.shape != (self.batch, *made[0].shape):
                raise _OtherCallError
            return result, made
        results = []
        for node, dtype, shares in expected.results:
            if shares == "all":
                results.append(first)
            elif shares and kind == SAME:
                results.append(first.detach())
            else:
                results.append(_without_memory((self.batch, *node.shape), dtype))
        return results[0] if expected.is_one else tuple(results), made


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _tells_batch(func: Any, x: Any, dim: int | None = None, *_: Any, **__: Any) -> bool:
    """Whether the result of a call that computes nothing depends on the batch size."""
    if func is Tensor.size:
        return dim is None or dim % x.dim() == 0
    return func in (Tensor.numel, Tensor.__len__) or getattr(func, "__self__", None) in (Tensor.shape, Tensor.nbytes)


@contextlib.contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """A context in which fastgen.nn.Sequential runs its layers one by one, as PyTorch's does."""
    fused = [m for m in module.modules() if is_fused(m)]
    for m in fused:
        m.forward = functools.partial(nn.Sequential.forward, m)  # type: ignore[method-assign,arg-type]
    try:
        yield
    finally:
        for m in fused:
            del m.forward


def is_fused(module: nn.Module) -> bool:
    # Statically: a ScriptModule's forward is a descriptor that raises.
    return getattr_static(type(module), "forward") is Sequential.forward and "forward" not in vars(module)


def tensors(result: object) -> tuple[Tensor, ...]:
    """The tensors of a model's output, which is a tensor, or a tuple or list of them. Raises UnsupportedError for other
    outputs."""
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
    copies = [x.clone() for x in inputs]
    recorder = _Recorder(copies)
    outputs = _outputs(module, copies, recorder)
    if recorder.reads_batch_size:
        _check_numbers(module, inputs, recorder, outputs)
    for node in outputs:
        node.uses += 1
    for node in in_order(outputs):
        for before in node.inputs:
            before.uses += 1
    return recorder.inputs, outputs


def _check_numbers(module: nn.Module, inputs: tuple[Tensor, ...], recorded: _Recorder, outputs: list[Node]) -> None:
    """Raises UnsupportedError unless the module calls the same functions for any batch size."""
    for n in _NUMBERS:
        blanks = [_without_memory((n, *x.shape[1:]), x.dtype) for x in inputs]
        replay = _Replay(blanks, recorded)
        try:
            same = _outputs(module, blanks, replay) == outputs and replay.at == len(recorded.calls)
        except _OtherCallError:
            same = False
        except Exception as error:  # the model's own code may raise anything
            raise UnsupportedError(f"it takes {len(inputs[0])} images, but not {n}: {first_line(error)}") from error
        if not same:
            raise UnsupportedError(f"it computes something else for {n} images than for {len(inputs[0])}")


def _without_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu").expand(shape)


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return type(a) is type(b) and a == b


def _outputs(module: nn.Module, inputs: list[Tensor], recorder: _Recorder) -> list[Node]:
    with torch.no_grad(), unfused(module), recorder:
        result = module(*inputs)
    outputs: list[Node] = []
    for value in tensors(result):
        node = recorder.node(value)
        if node is None or value.dtype != torch.float32:
            raise UnsupportedError(
                "its output does not come from its input" if node is None else f"its output is {value.dtype}"
            )
        outputs.append(node)
    return outputs


def in_order(outputs: list[Node]) -> list[Node]:
    """The nodes that the outputs depend on, each after those that it reads."""
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
