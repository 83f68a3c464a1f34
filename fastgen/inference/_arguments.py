"""The arguments of a forward for tracing: which values to try, and which questions the code may ask about them.

Tracing follows one path through a forward at a time. `argument_combinations` lists the calls to trace (with an optional
argument given or not, None or not). The proxies turn each yes-or-no question about a traced value into a branch, both
sides of which are traced, and raise UntraceableError for questions with more answers.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from types import FrameType, FunctionType
from typing import Any

from torch import fx

from fastgen.inference._bytecode import argument_checks

_ANY_TENSOR, _ABSENT = object(), object()


class UntraceableError(BaseException):  # a BaseException passes the `except Exception` of the code that is traced
    """The dataflow of a forward cannot be found; the message says why."""


def argument_combinations(forward: FunctionType, functions: Sequence[FunctionType]) -> Iterator[dict[str, Any]]:
    """The calls of a forward to trace: for each, the values of the arguments that are not tensors, by name.

    An argument is a tensor, its default, or None where forward or one of these functions may compare it with None;
    *args and **kwargs may be empty. Raises UntraceableError if forward checks an argument in other ways.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = {parameter.name for parameter in parameters}
    compared_in_forward, checked = argument_checks(forward.__code__)
    if checked & names:
        raise UntraceableError(f"it checks the type, identity or attributes of {' and '.join(sorted(checked & names))}")
    compared_elsewhere = set().union(*(argument_checks(f.__code__).for_none for f in functions if f is not forward))
    compared = compared_in_forward if compared_in_forward <= names and not compared_elsewhere else names
    values: dict[str, list[Any]] = {}
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            values[f"*{parameter.name}"] = [_ANY_TENSOR, ()]
        elif parameter.kind == parameter.VAR_KEYWORD:
            values[f"**{parameter.name}"] = [_ANY_TENSOR, {}]
        else:
            default = [] if parameter.default is parameter.empty else [parameter.default]
            none = [None] if parameter.name in compared and default != [None] else []
            values[parameter.name] = [_ANY_TENSOR, *default, *none]
    for combination in itertools.product(*values.values()):
        yield {name: value for name, value in zip(values, combination, strict=True) if value is not _ANY_TENSOR}


class TracedValue(fx.Proxy):
    """A traced value. It cannot be converted to a Python number or be the key of a dictionary or set."""

    def _unknown(self) -> Any:
        raise UntraceableError("it converts a value to a Python number, or looks it up in a dictionary or set")

    __int__ = __float__ = __complex__ = __index__ = __len__ = __hash__ = _unknown

    def __getattr__(self, name: str) -> Any:
        return _TracedAttribute(self, name)


class _TracedAttribute(TracedValue, fx.proxy.Attribute):
    __hash__ = TracedValue.__hash__


class VariadicArguments(TracedValue):
    """*args or **kwargs that are not empty. Whether they hold an entry, and whether it is None, are branches."""

    tracer: Any

    def __init__(self, node: fx.Node, tracer: Any):
        super().__init__(node, tracer)
        self._entries: dict[Any, Any] = {}

    def _entry(self, key: Any, may_be_none: bool = True) -> Any:
        if key not in self._entries:
            self._entries[key] = _ABSENT
            if self.tracer.to_bool(self):
                is_none = may_be_none and self.tracer.to_bool(self)
                self._entries[key] = None if is_none else super().__getitem__(key)  # type: ignore[misc]
        return self._entries[key]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, (str, int)):
            return super().__getitem__(key)  # type: ignore[misc]
        value = self._entry(key)
        if value is _ABSENT:
            self.tracer.expected_error = (KeyError if isinstance(key, str) else IndexError)(key)
            raise self.tracer.expected_error
        return value

    def __contains__(self, key: Any) -> bool:
        return self._entry(key) is not _ABSENT

    def get(self, key: Any, default: Any = None) -> Any:
        value = self._entry(key, may_be_none=default is not None)
        return default if value is _ABSENT else value

    def pop(self, key: Any, *default: Any) -> Any:
        value = self.get(key, *default) if default else self[key]
        self._entries[key] = _ABSENT
        return value

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and (hasattr(dict, name) or hasattr(tuple, name)):
            raise UntraceableError(f"it uses .{name} of its arguments")
        return super().__getattr__(name)


def _len(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return len(value)


def _isinstance(value: Any, classes: Any) -> bool:
    return value.tracer.to_bool(value) if isinstance(value, fx.Proxy) else isinstance(value, classes)


@contextlib.contextmanager
def watched_builtins(functions: Sequence[FunctionType]) -> Iterator[None]:
    """In the files of these functions, len() of a traced value is a traced value, and isinstance() of it is a
    branch."""
    replacements = {"len": _len, "isinstance": _isinstance}
    files = {id(function.__globals__): function.__globals__ for function in functions}
    shadowed = [(variables, name) for variables in files.values() for name in replacements if name not in variables]
    for variables, name in shadowed:
        variables[name] = replacements[name]
    try:
        yield
    finally:
        for variables, name in shadowed:
            del variables[name]


def is_watched(frame: FrameType) -> bool:
    """Whether a running function is in one of the files of watched_builtins."""
    return frame.f_globals.get("isinstance") is _isinstance


def checks_types(frame: FrameType) -> bool:
    """Whether a running function checks the type of a value in a way that watched_builtins does not see."""
    names = frame.f_code.co_names
    return "is_tensor" in names or ("isinstance" in names and not is_watched(frame))
