"""What a module's own forward does with its submodules: every path through it, traced by torch.fx.

A forward is called once per path, on a copy of the module, with proxies in place of tensors. Submodules are leaves:
their calls are recorded and not followed. At each branch on a traced value the first call takes one side and a later
call the other (`_paths` counts through the decisions as through binary numbers).
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn

from fastgen.inference import _arguments
from fastgen.inference._arguments import UntraceableError
from fastgen.inference._bytecode import location, reachable_functions
from fastgen.inference._runs import is_plain, kind
from fastgen.inference._sandbox import clone, preserved_rng

MAX_PATHS = 128  # through one forward


@dataclass
class Trace:
    """The calls of submodules in a forward, on all its paths."""

    graphs: list[fx.Graph] = field(default_factory=list)  # one per path
    contexts: dict[fx.Node, list] = field(default_factory=dict)  # equal for calls by one function in the same mode
    stored: set[fx.Node] = field(default_factory=set)  # calls whose results were stored somewhere
    executed: set[tuple[str | None, tuple]] = field(default_factory=set)  # functions: path of `self`, and location
    direct: set[fx.Node] = field(default_factory=set)  # calls of a module's forward instead of the module
    rejecting: set[str] = field(default_factory=set)  # paths of modules that are called with arguments they reject


def trace(module: nn.Module) -> Trace:
    """All paths through the module's own forward: in training and evaluation mode, with and without each optional
    argument, and both ways of each branch on a value.

    A copy runs, so that values that forward stores are discarded, and the random number generators are restored. Flags
    that forward reads from the module keep their current values. A path that ends in an exception of the user's code,
    or because a module rejects its arguments, computes nothing and is left out. Raises UntraceableError.
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward was replaced on the instance")
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise UntraceableError("it is not a Python function")
    traced, functions = Trace(), reachable_functions(type(module))
    names = {name for function in functions for name in function.__code__.co_names}
    modes = [(True, True), (False, False)]  # training, and with gradients
    if "is_grad_enabled" in names:
        modes += [(True, False), (False, True)]
    for name in ("is_autocast_enabled", "is_inference_mode_enabled"):
        if name in names:
            raise UntraceableError(f"it calls {name}")
    if any("checkpoint" in name for name in names):
        # The first call of a checkpoint imports torch._dynamo. Imported while torch.fx has replaced the functions of
        # `math`, it would break every graph that is compiled later.
        importlib.import_module("torch._dynamo")
    with _arguments.watched_builtins(functions):
        for mode, fixed in itertools.product(modes, _arguments.argument_combinations(forward, functions)):
            for graph in _paths(module, mode, fixed, traced):
                traced.graphs.append(graph)
                if len(traced.graphs) > MAX_PATHS:
                    raise UntraceableError(f"there are more than {MAX_PATHS} paths through it")
    if not traced.graphs:
        raise UntraceableError("it always raises an exception")
    return traced


def _paths(module: nn.Module, mode: tuple[bool, bool], fixed: dict[str, Any], traced: Trace) -> Iterator[fx.Graph]:
    """The graph of each path, in one mode and with some arguments fixed."""
    decisions: list[bool] = []
    for _ in range(MAX_PATHS + 1):
        tracer = _Tracer(traced, decisions)
        try:
            root = clone(module, share_parameters=True)
            root.train(mode[0])
            tracer.prepare(root)
            with preserved_rng() as was_used, torch.set_grad_enabled(mode[1]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = tracer.trace(root, fixed)
                if was_used():
                    raise UntraceableError("it draws random numbers that tracing does not see")
        except UntraceableError:
            raise
        except Exception as error:  # the user's code may raise anything
            if not _is_users_error(error, tracer.expected_error, type(module).__module__):
                raise UntraceableError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        else:
            traced.stored |= tracer.stored()
            yield graph
        while decisions and decisions[-1]:
            decisions.pop()
        if not decisions:
            return
        decisions[-1] = True
    raise UntraceableError(f"there are more than {MAX_PATHS} paths through it")


class _Tracer(fx.Tracer):
    """Follows one path: at branches on values it follows `decisions`; at later branches it decides False and appends
    that."""

    def __init__(self, traced: Trace, decisions: list[bool]):
        super().__init__()
        self.traced, self.decisions, self.branch = traced, decisions, 0
        self.results: list[weakref.ref[fx.Proxy]] = []  # of calls of modules
        self.callers: dict[FrameType | None, int] = {}  # the functions that made these calls, numbered
        self.expected_error: Exception | None = None  # an error that the same call raises without tracing too

    def proxy(self, node: fx.Node) -> fx.Proxy:
        is_variadic = node.op == "placeholder" and str(node.target).startswith("*")
        return (_arguments.VariadicArguments if is_variadic else _arguments.TracedValue)(node, self)

    def prepare(self, root: nn.Module) -> None:
        """Makes direct calls of the forwards of PyTorch's layers leaves too: they bypass the module's hooks."""
        self.plain = {module for module in root.modules() if is_plain(module)}
        for module in root.modules():
            if not module._modules and kind(module).__module__.startswith("torch.nn.modules."):
                module.__dict__["forward"] = functools.partial(self._call_forward, module)

    def _call_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = self.create_proxy("call_module", self.path_of_module(module), args, kwargs)
        self.traced.direct.add(result.node)
        return result

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.branch == len(self.decisions):
            self.decisions.append(False)
        if self.branch == MAX_PATHS:
            raise UntraceableError("it loops on a value")
        self.branch += 1
        return self.decisions[self.branch - 1]

    def iter(self, obj: fx.Proxy) -> Any:
        raise UntraceableError("it iterates over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise UntraceableError("it passes on **kwargs")

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._check_arguments(m, args, kwargs)
        result = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        self.results.append(weakref.ref(result))
        frame: FrameType | None = sys._getframe(2)  # of the function that calls the module, past torch.fx
        caller = frame
        while caller and caller.f_code.co_name.startswith(("_", "<")):  # private helpers, which only their module calls
            caller = caller.f_back
        context: list[Any] = [self.callers.setdefault(caller, len(self.callers)), torch.is_grad_enabled()]
        for device in ("cpu", "cuda"):
            context.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        while frame and frame.f_globals.get("__name__") != fx._symbolic_trace.__name__:
            if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
                context.append(object())  # equal to no other: a checkpoint's second pass may end between two calls
            in_torch = str(frame.f_globals.get("__name__")).startswith("torch.")
            if not in_torch and _arguments.checks_types(frame):
                raise UntraceableError("it checks whether a value is a Tensor")
            module = frame.f_locals.get("self")
            path = self.path_of_module(module) if isinstance(module, nn.Module) else None
            self.traced.executed.add((path, location(frame.f_code)))
            frame = frame.f_back
        self.traced.contexts[result.node] = context
        return result

    def stored(self) -> set[fx.Node]:
        """The calls whose results are still alive after tracing, since something stores them."""
        self.expected_error = None  # its frames would keep variables alive
        self.callers.clear()
        return {value.node for value in [result() for result in self.results] if value is not None}

    def _check_arguments(self, m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises TypeError if the module's forward does not take these arguments."""
        forward = inspect.getattr_static(kind(m), "forward")
        if isinstance(forward, FunctionType) and m in self.plain:
            try:
                _signature(forward).bind(m, *args, **kwargs)
            except TypeError as error:
                self.traced.rejecting.add(self.path_of_module(m))
                self.expected_error = error
                raise


_signature = functools.cache(functools.partial(inspect.signature, follow_wrapped=False))


def _is_users_error(error: BaseException, expected: Exception | None, module_name: str) -> bool:
    """Whether the exception comes from the user's code or arguments, like the expected one, and not from a limitation
    of tracing."""
    if error is expected or (isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error)):
        return True
    if error.__context__ is not None and not _is_users_error(error.__context__, expected, module_name):
        return False
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    if at is None or not _arguments.is_watched(at.tb_frame) or _arguments.checks_types(at.tb_frame):
        return False
    other_package = module_name.partition(".")[0] != at.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    if other_package and "Proxy" in str(error):  # that package refused the class of the value
        return False
    opcodes = {i.offset: i.opname for i in dis.get_instructions(at.tb_frame.f_code)}
    return opcodes.get(at.tb_lasti) == "RAISE_VARARGS"
