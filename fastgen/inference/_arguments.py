"""What a forward may be called with, and what it asks of that: each answer is a path of its own."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from types import FrameType, FunctionType
from typing import Any

from torch import fx

from fastgen.inference._bytecode import questions

_ANY, _ABSENT = object(), object()


class UntraceableError(BaseException):  # past the `except Exception` of the code that is traced
    """The dataflow of a forward is not known; the message says why."""


def ways(forward: FunctionType, functions: Sequence[FunctionType]) -> Iterator[dict[str, Any]]:
    """What the arguments of a forward may be besides tensors: those that are fixed, by name.

    Each is a tensor, or its default, or None if forward or one of these functions may ask for that; *args and **kwargs
    may be empty. Raises UntraceableError if forward asks what else one is.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = {parameter.name for parameter in parameters}
    in_forward, asked = questions(forward.__code__)
    if asked & names:
        raise UntraceableError(f"it asks what {' and '.join(sorted(asked & names))} is")
    elsewhere = set().union(*(questions(f.__code__).none for f in functions if f is not forward))
    compared = in_forward if in_forward <= names and not elsewhere else names
    values: dict[str, list[Any]] = {}
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            values[f"*{parameter.name}"] = [_ANY, ()]
        elif parameter.kind == parameter.VAR_KEYWORD:
            values[f"**{parameter.name}"] = [_ANY, {}]
        else:
            default = [] if parameter.default is parameter.empty else [parameter.default]
            none = [None] if parameter.name in compared and default != [None] else []
            values[parameter.name] = [_ANY, *default, *none]
    for way in itertools.product(*values.values()):
        yield {name: value for name, value in zip(values, way, strict=True) if value is not _ANY}


class Value(fx.Proxy):
    """A traced value. What Python makes of it by itself is not known: numbers, and what a dictionary has at it."""

    def _unknown(self) -> Any:
        raise UntraceableError("it makes a Python number of a value, or looks it up in a dictionary or set")

    __int__ = __float__ = __complex__ = __index__ = __len__ = __hash__ = _unknown

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(Value, fx.proxy.Attribute):
    __hash__ = Value.__hash__


class Given(Value):
    """*args or **kwargs, of which there are some: each that is looked up is there or not, and None or not."""

    tracer: Any

    def __init__(self, node: fx.Node, tracer: Any):
        super().__init__(node, tracer)
        self._values: dict[Any, Any] = {}

    def _value(self, key: Any, may_be_none: bool = True) -> Any:
        if key not in self._values:
            self._values[key] = _ABSENT
            if self.tracer.to_bool(self):
                is_none = may_be_none and self.tracer.to_bool(self)
                self._values[key] = None if is_none else super().__getitem__(key)  # type: ignore[misc]
        return self._values[key]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, (str, int)):
            return super().__getitem__(key)  # type: ignore[misc]
        value = self._value(key)
        if value is _ABSENT:
            self.tracer.raised = (KeyError if isinstance(key, str) else IndexError)(key)
            raise self.tracer.raised
        return value

    def __contains__(self, key: Any) -> bool:
        return self._value(key) is not _ABSENT

    def get(self, key: Any, default: Any = None) -> Any:
        value = self._value(key, may_be_none=default is not None)
        return default if value is _ABSENT else value

    def pop(self, key: Any, *default: Any) -> Any:
        value = self.get(key, *default) if default else self[key]
        self._values[key] = _ABSENT
        return value

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and (hasattr(dict, name) or hasattr(tuple, name)):
            raise UntraceableError(f"it uses .{name} of its arguments")
        return super().__getattr__(name)


def _len(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return len(value)


def _isinstance(value: Any, kinds: Any) -> bool:
    return value.tracer.to_bool(value) if isinstance(value, fx.Proxy) else isinstance(value, kinds)


@contextlib.contextmanager
def asked_by(functions: Sequence[FunctionType]) -> Iterator[None]:
    """len() of what is traced is a value, and isinstance() a branch, where the files of these functions ask."""
    names = {"len": _len, "isinstance": _isinstance}
    homes = {id(function.__globals__): function.__globals__ for function in functions}
    shadowed = [(home, name) for home in homes.values() for name in names if name not in home]
    for home, name in shadowed:
        home[name] = names[name]
    try:
        yield
    finally:
        for home, name in shadowed:
            del home[name]


def is_watched(frame: FrameType) -> bool:
    """Whether a running function's file is one of asked_by's."""
    return frame.f_globals.get("isinstance") is _isinstance


def asks_for_types(frame: FrameType) -> bool:
    """Whether a running function asks for the type of a value, by what asked_by does not see."""
    names = frame.f_code.co_names
    return "is_tensor" in names or ("isinstance" in names and not is_watched(frame))
