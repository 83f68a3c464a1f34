"""What functions do with modules and arguments, as far as their bytecode says, without running them."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

OURS = ("torch.", "fastgen.nn.", "fastgen.inference.", "builtins")  # modules whose forwards are known, or need not be
# They hand out any submodule.
_BY_NAME = {"get_submodule", "_modules", "attrgetter", "methodcaller", "__getattribute__"}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_NO_OPERATION = ("PUSH_NULL", "PRECALL", "EXTENDED_ARG", "NOP", "COPY_FREE_VARS")


class Uses(NamedTuple):
    """The attributes that a function uses, by more than reading an attribute of theirs, and all that it loads."""

    used: frozenset[str]
    loaded: frozenset[str]
    by_name: bool  # whether it may use any attribute, by a name that it computes
    by_index: bool  # whether it subscripts or iterates over something


def where(code: CodeType) -> tuple[str, int, str]:
    """What identifies a function, also in torch.fx's copies of it."""
    return code.co_filename, code.co_firstlineno, code.co_name


def methods(cls: type) -> Iterator[FunctionType]:
    """The methods and properties of a class and its bases, but for PyTorch's and __init__."""
    for base in cls.__mro__:
        if not base.__module__.startswith(OURS):
            for name, value in vars(base).items():
                inside = (getattr(value, attribute, None) for attribute in ("fget", "func", "__func__"))
                if name != "__init__":
                    yield from decorated(next(filter(None, inside), value))


def decorated(value: object) -> Iterator[FunctionType]:
    """A function and those that it wraps, as decorators do, but for PyTorch's."""
    if not isinstance(value, FunctionType):
        return
    if not value.__globals__.get("__name__", "").startswith(OURS):
        yield value
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield from decorated(cell.cell_contents) if cell.cell_contents is not value else ()


def reached(cls: type) -> list[FunctionType]:
    """The methods of a class, and the functions of other people's files that they name, and these in turn."""
    found: dict[CodeType, FunctionType] = {}
    todo = list(methods(cls))
    while todo:
        function = todo.pop()
        if function.__code__ not in found:
            found[function.__code__] = function
            todo.extend(inner for value in _named(function) for inner in decorated(value))
    return list(found.values())


def _named(function: FunctionType) -> Iterator[FunctionType]:
    """Functions that one names, but for the standard library's."""
    names = {name for code in _nested(function.__code__) for name in code.co_names}
    package = function.__module__ and function.__module__.partition(".")[0]
    for value in [function.__globals__.get(name) for name in names]:
        of_package = isinstance(value, ModuleType) and value.__name__.partition(".")[0] == package
        for found in [vars(value).get(name) for name in names] if of_package else [value]:
            if (
                isinstance(found, FunctionType)
                and str(found.__module__).partition(".")[0] not in sys.stdlib_module_names
            ):
                yield found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


class Questions(NamedTuple):
    """The variables for which a function asks whether they are None, and those for which it asks what else they are."""

    none: frozenset[str]
    other: frozenset[str]


@functools.cache
def questions(code: CodeType) -> Questions:
    """Those that an operator of the value cannot answer: `is`, type(), hasattr(), callable()."""
    none: set[str] = set()
    other: set[str] = set()
    for inner in _nested(code):
        instructions = [i for i in dis.get_instructions(inner) if i.opname not in _NO_OPERATION]
        for at, instruction in enumerate(instructions):
            if instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
                none |= _variables(instructions[at - 1 : at])
            elif instruction.opname == "IS_OP":
                is_none = instructions[at - 1].opname == "LOAD_CONST" and instructions[at - 1].argval is None
                found = _variables(instructions[max(0, at - 2) : at])
                (none if is_none else other).update(found)
            elif instruction.opname.startswith("LOAD") and instruction.argval in ("type", "hasattr", "callable"):
                other |= _variables(instructions[at + 1 : at + 2])
    return Questions(frozenset(none), frozenset(other))


def _variables(instructions: Sequence[dis.Instruction]) -> set[str]:
    found: set[str] = set()
    for instruction in instructions:
        if "FAST" in instruction.opname or "DEREF" in instruction.opname:
            found.update([instruction.argval] if isinstance(instruction.argval, str) else instruction.argval)
    return found


@functools.cache
def uses(code: CodeType) -> Uses:
    """Of a function and of those within it."""
    used: set[str] = set()
    loaded: set[str] = set()
    by_name = by_index = False
    for inner in _nested(code):
        instructions = [i for i in dis.get_instructions(inner) if i.opname not in _NO_OPERATION]
        for at, instruction in enumerate(instructions):
            name = instruction.argval if isinstance(instruction.argval, str) else ""
            if instruction.opname in _ATTRIBUTES:
                after = instructions[at + 1] if at + 1 < len(instructions) else None
                reads = after is not None and after.opname in _ATTRIBUTES and after.argval != "forward"
                loaded.add(name)
                used |= set() if reads else {name}
            if name == "getattr" and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                wanted = _wanted(instructions[at + 1 :])
                used |= wanted or set()
                loaded |= wanted or set()
                by_name = by_name or wanted is None
            by_name = by_name or (name in _BY_NAME and instruction.opname.startswith("LOAD"))
            by_index = by_index or instruction.opname in ("BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER", "FOR_ITER")
            by_index = by_index or (instruction.opname == "BINARY_OP" and "[" in instruction.argrepr)
    return Uses(frozenset(used), frozenset(loaded), by_name, by_index)


def _wanted(after: Sequence[dis.Instruction]) -> set[str] | None:
    """The attributes that a call of getattr, which these instructions follow, may give; None: any."""
    if not after or isinstance(after[0].argval, tuple):  # two variables at once
        return None
    if after[0].opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        return set()  # of a Python module or a class
    at = 1
    while at < len(after) and after[at].opname in _ATTRIBUTES:
        at += 1
    given = after[at : at + 3]
    if len(given) < 2 or given[0].opname != "LOAD_CONST" or not isinstance(given[0].argval, str):
        return None
    has_default = given[1].opname.startswith("LOAD")
    call = given[-1] if has_default else given[1]
    return {given[0].argval} if call.opname.startswith("CALL") and call.arg == 2 + has_default else None
