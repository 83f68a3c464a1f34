"""What a module's own forward does with its submodules: each path through it, traced by torch.fx."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import importlib
import inspect
import itertools
import pickle
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from fastgen.inference import _arguments
from fastgen.inference._arguments import UntraceableError
from fastgen.inference._bytecode import reached, where
from fastgen.nn import _patterns

M = TypeVar("M", bound=nn.Module)
MOST_PATHS = 128  # through one forward


@dataclass
class Trace:
    """The calls of submodules in a forward, which are leaves, along all its paths."""

    graphs: list[fx.Graph] = field(default_factory=list)
    places: dict[fx.Node, list] = field(default_factory=dict)  # equal for calls made in one function and mode
    kept: set[fx.Node] = field(default_factory=set)  # those whose values were stored
    ran: set[tuple[str | None, tuple]] = field(default_factory=set)  # the path of `self`, and where the function is
    direct: set[fx.Node] = field(default_factory=set)  # calls of a module's forward, not of the module
    refusing: set[str] = field(default_factory=set)  # modules that a path calls with arguments that they do not have


def clone(model: M, *, share: bool) -> M:
    """copy.deepcopy, also of modules that keep a computed tensor (as old spectral_norm does); share: not of
    parameters."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
        if share and "_fastgen" in vars(module):
            memo[id(module._fastgen)] = module._fastgen
    if share:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    with torch.inference_mode(False):  # what is copied there could not be trained afterwards
        return copy.deepcopy(model, memo)


def trace(module: nn.Module) -> Trace:
    """All paths through the module's own forward: in training and not, with and without each optional argument, either
    way of each branch on a value.

    A copy runs, so that nothing that forward stores is seen, and the random number generators stay as they were. Flags
    that forward reads from the module are taken as they are. A path that ends in an exception, of the user's or because
    a module does not take what it is called with, computes nothing. Raises UntraceableError.
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward was replaced on the instance")
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise UntraceableError("it is not a Python function")
    found, functions = Trace(), reached(type(module))
    asked = {name for function in functions for name in function.__code__.co_names}
    modes = [(True, True), (False, False)]  # training, and with gradients
    if "is_grad_enabled" in asked:
        modes += [(True, False), (False, True)]
    for name in ("is_autocast_enabled", "is_inference_mode_enabled"):
        if name in asked:
            raise UntraceableError(f"it asks {name}")
    if any("checkpoint" in name for name in asked):
        # Its first call would, while torch.fx has replaced the functions of `math`: graphs compiled later would break
        # at each.
        importlib.import_module("torch._dynamo")
    with _arguments.asked_by(functions):
        for mode, fixed in itertools.product(modes, _arguments.ways(forward, functions)):
            for graph in _paths(module, mode, fixed, found):
                found.graphs.append(graph)
                if len(found.graphs) > MOST_PATHS:
                    raise UntraceableError(f"there are more than {MOST_PATHS} paths through it")
    if not found.graphs:
        raise UntraceableError("it always raises")
    return found


def _paths(module: nn.Module, mode: tuple[bool, bool], fixed: dict[str, Any], found: Trace) -> Iterator[fx.Graph]:
    decisions: list[bool] = []
    for _ in range(MOST_PATHS + 1):
        tracer = _Tracer(found, decisions)
        try:
            root = clone(module, share=True)
            root.train(mode[0])
            tracer.prepare(root)
            with randomness() as drawn, torch.set_grad_enabled(mode[1]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = tracer.trace(root, fixed)
                if drawn():
                    raise UntraceableError("it draws random numbers that tracing does not see")
        except UntraceableError:
            raise
        except Exception as error:  # the user's code may raise anything
            if not _raised_by_user(error, tracer.raised, type(module).__module__):
                raise UntraceableError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        else:
            found.kept |= tracer.kept()
            yield graph
        while decisions and decisions[-1]:
            decisions.pop()
        if not decisions:
            return
        decisions[-1] = True
    raise UntraceableError(f"there are more than {MOST_PATHS} paths through it")


class _Tracer(fx.Tracer):
    """Follows one path: at branches on values first `decisions`, then False, which it adds to them."""

    def __init__(self, found: Trace, decisions: list[bool]):
        super().__init__()
        self.found, self.decisions, self.branch = found, decisions, 0
        self.called: list[weakref.ref[fx.Proxy]] = []  # what calls of modules gave
        self.callers: dict[FrameType | None, int] = {}  # who made them, numbered
        self.raised: Exception | None = None  # what the same call raises in any case

    def proxy(self, node: fx.Node) -> fx.Proxy:
        is_variadic = node.op == "placeholder" and str(node.target).startswith("*")
        return _arguments.Given(node, self) if is_variadic else _arguments.Value(node, self)

    def prepare(self, root: nn.Module) -> None:
        """Makes the forwards of PyTorch's layers leaves too: such a call is not one of the module."""
        self.plain = {module for module in root.modules() if _patterns.is_plain(module)}
        for module in root.modules():
            if not module._modules and _patterns.kind(module).__module__.startswith("torch.nn.modules."):
                module.__dict__["forward"] = functools.partial(self._call_forward, module)

    def _call_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called = self.create_proxy("call_module", self.path_of_module(module), args, kwargs)
        self.found.direct.add(called.node)
        return called

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.branch == len(self.decisions):
            self.decisions.append(False)
        if self.branch == MOST_PATHS:
            raise UntraceableError("it loops on a value")
        self.branch += 1
        return self.decisions[self.branch - 1]

    def iter(self, obj: fx.Proxy) -> Any:
        raise UntraceableError("it iterates over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise UntraceableError("it passes on **kwargs")

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._check_takes(m, args, kwargs)
        called = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        frame: FrameType | None = sys._getframe(2)  # past torch.fx
        caller = frame
        while caller and caller.f_code.co_name.startswith(("_", "<")):  # helpers that only their module calls
            caller = caller.f_back
        self.called.append(weakref.ref(called))
        place: list[Any] = [self.callers.setdefault(caller, len(self.callers)), torch.is_grad_enabled()]
        for device in ("cpu", "cuda"):
            place.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        while frame and frame.f_globals.get("__name__") != fx._symbolic_trace.__name__:
            if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
                place.append(object())  # no run: a checkpoint's second pass may end in its middle
            in_torch = str(frame.f_globals.get("__name__")).startswith("torch.")
            if not in_torch and _arguments.asks_for_types(frame):
                raise UntraceableError("it asks whether a value is a Tensor")
            module = frame.f_locals.get("self")
            path = self.path_of_module(module) if isinstance(module, nn.Module) else None
            self.found.ran.add((path, where(frame.f_code)))
            frame = frame.f_back
        self.found.places[called.node] = place
        return called

    def kept(self) -> set[fx.Node]:
        """Those calls whose values are alive after tracing: they were stored somewhere."""
        self.raised = None  # with the frames, whose variables are gone
        self.callers.clear()
        return {value.node for value in [called() for called in self.called] if value is not None}

    def _check_takes(self, m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises TypeError if the module's forward does not have these arguments."""
        forward = inspect.getattr_static(_patterns.kind(m), "forward")
        if isinstance(forward, FunctionType) and m in self.plain:
            try:
                _signature(forward).bind(m, *args, **kwargs)
            except TypeError as error:
                self.found.refusing.add(self.path_of_module(m))
                self.raised = error
                raise


_signature = functools.cache(functools.partial(inspect.signature, follow_wrapped=False))


@contextlib.contextmanager
def randomness() -> Iterator[Callable[[], bool]]:
    """Puts the random number generators back at the end; yields whether they were used since the start."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def drawn() -> bool:
        of_numpy = numpy and pickle.dumps(numpy.random.get_state()) != pickle.dumps(before[2])
        return bool(of_numpy) or random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1])

    try:
        yield drawn
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if numpy:
            numpy.random.set_state(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _raised_by_user(error: BaseException, known: Exception | None, home: str) -> bool:
    """Whether the exception comes from the user's code or arguments, as `known` does, and not from what tracing cannot
    do."""
    if error is known or (isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error)):
        return True
    if error.__context__ is not None and not _raised_by_user(error.__context__, known, home):
        return False
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    if at is None or not _arguments.is_watched(at.tb_frame) or _arguments.asks_for_types(at.tb_frame):
        return False
    of_another = home.partition(".")[0] != at.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    if of_another and "Proxy" in str(error):  # it knows its kinds of values
        return False
    opcodes = {i.offset: i.opname for i in dis.get_instructions(at.tb_frame.f_code)}
    return opcodes.get(at.tb_lasti) == "RAISE_VARARGS"
