"""What functions do with submodules and arguments, read from their bytecode without running them.

Tracing (_trace.py) sees what a forward does, except for two things. A method that no traced forward runs may use a
submodule too: `uses` finds the attributes that it names. And Python itself answers some questions about an argument
(`is None`, type()), so that a traced value cannot intercept them: `argument_checks` finds these. Code that is not
understood counts as a use, so that a doubt prevents a fusion and never causes one.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

LIBRARY = ("torch.", "fastgen.nn.", "fastgen.inference.", "builtins")  # modules whose code is known, or does not matter
# Names that give access to any submodule.
_ACCESS_BY_NAME = {"get_submodule", "_modules", "attrgetter", "methodcaller", "__getattribute__"}
_ATTRIBUTE_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_NO_OPERATION = ("PUSH_NULL", "PRECALL", "EXTENDED_ARG", "NOP", "COPY_FREE_VARS")


def location(code: CodeType) -> tuple[str, int, str]:
    """Identifies a function, also in torch.fx's copies of it."""
    return code.co_filename, code.co_firstlineno, code.co_name


def user_methods(cls: type) -> Iterator[FunctionType]:
    """The methods and properties of a class and its bases, except __init__ and those of libraries."""
    for base in cls.__mro__:
        if not base.__module__.startswith(LIBRARY):
            for name, value in vars(base).items():
                inner = (getattr(value, attribute, None) for attribute in ("fget", "func", "__func__"))
                if name != "__init__":
                    yield from user_functions(next(filter(None, inner), value))


def user_functions(value: object) -> Iterator[FunctionType]:
    """A function and those that it wraps, as decorators do, except those of libraries."""
    if not isinstance(value, FunctionType):
        return
    if not value.__globals__.get("__name__", "").startswith(LIBRARY):
        yield value
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            yield from user_functions(cell.cell_contents) if cell.cell_contents is not value else ()


def reachable_functions(cls: type) -> list[FunctionType]:
    """The methods of a class, the functions that they name (not those of libraries), and so on."""
    found: dict[CodeType, FunctionType] = {}
    todo = list(user_methods(cls))
    while todo:
        function = todo.pop()
        if function.__code__ not in found:
            found[function.__code__] = function
            todo.extend(inner for value in _named_functions(function) for inner in user_functions(value))
    return list(found.values())


def _named_functions(function: FunctionType) -> Iterator[FunctionType]:
    """The functions that a function names, except the standard library's."""
    names = {name for code in _nested_code(function.__code__) for name in code.co_names}
    package = function.__module__ and function.__module__.partition(".")[0]
    for value in [function.__globals__.get(name) for name in names]:
        in_package = isinstance(value, ModuleType) and value.__name__.partition(".")[0] == package
        for found in [vars(value).get(name) for name in names] if in_package else [value]:
            if (
                isinstance(found, FunctionType)
                and str(found.__module__).partition(".")[0] not in sys.stdlib_module_names
            ):
                yield found


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested_code(constant)


def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in _NO_OPERATION]


class ArgumentChecks(NamedTuple):
    """The variables of a function that it compares with None, and those that it checks in other ways."""

    for_none: frozenset[str]
    otherwise: frozenset[str]


@functools.cache
def argument_checks(code: CodeType) -> ArgumentChecks:
    """The checks that a traced value cannot intercept, since they do not call its operators: `is`, type(), hasattr(),
    callable()."""
    for_none: set[str] = set()
    otherwise: set[str] = set()
    for inner in _nested_code(code):
        instructions = _instructions(inner)
        for at, instruction in enumerate(instructions):
            if instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
                for_none |= _variables(instructions[at - 1 : at])
            elif instruction.opname == "IS_OP":
                is_none = instructions[at - 1].opname == "LOAD_CONST" and instructions[at - 1].argval is None
                compared = _variables(instructions[max(0, at - 2) : at])
                (for_none if is_none else otherwise).update(compared)
            elif instruction.opname.startswith("LOAD") and instruction.argval in ("type", "hasattr", "callable"):
                otherwise |= _variables(instructions[at + 1 : at + 2])
    return ArgumentChecks(frozenset(for_none), frozenset(otherwise))


def _variables(instructions: Sequence[dis.Instruction]) -> set[str]:
    """The local variables that the instructions name; some instructions name two."""
    found: set[str] = set()
    for instruction in instructions:
        if "FAST" in instruction.opname or "DEREF" in instruction.opname:
            found.update([instruction.argval] if isinstance(instruction.argval, str) else instruction.argval)
    return found


class Uses(NamedTuple):
    """The attributes that a function reads. In `self.net.layer(x)` these are `net` and `layer`, and `layer` is used,
    since it ends the chain."""

    used: frozenset[str]
    loaded: frozenset[str]  # all attributes that are read, used or not
    by_name: bool  # whether it may use any attribute, by a computed name
    by_index: bool  # whether it subscripts or iterates over something


@functools.cache
def uses(code: CodeType) -> Uses:
    """The attributes that a function, and the functions defined in it, read."""
    used: set[str] = set()
    loaded: set[str] = set()
    by_name = by_index = False
    for inner in _nested_code(code):
        instructions = _instructions(inner)
        for at, instruction in enumerate(instructions):
            name = instruction.argval if isinstance(instruction.argval, str) else ""
            if instruction.opname in _ATTRIBUTE_LOADS:
                after = instructions[at + 1] if at + 1 < len(instructions) else None
                chain_goes_on = after is not None and after.opname in _ATTRIBUTE_LOADS and after.argval != "forward"
                loaded.add(name)
                used |= set() if chain_goes_on else {name}
            if name == "getattr" and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names = _getattr_names(instructions[at + 1 :])
                used |= names or set()
                loaded |= names or set()
                by_name = by_name or names is None
            by_name = by_name or (name in _ACCESS_BY_NAME and instruction.opname.startswith("LOAD"))
            by_index = by_index or instruction.opname in ("BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER", "FOR_ITER")
            by_index = by_index or (instruction.opname == "BINARY_OP" and "[" in instruction.argrepr)
    return Uses(frozenset(used), frozenset(loaded), by_name, by_index)


def _getattr_names(after: Sequence[dis.Instruction]) -> set[str] | None:
    """The attributes that a call of getattr may return, by the instructions after the one that loads getattr; None:
    any attribute."""
    if not after or isinstance(after[0].argval, tuple):  # one instruction loads two variables
        return None
    if after[0].opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        return set()  # an attribute of a Python module or a class
    at = 1
    while at < len(after) and after[at].opname in _ATTRIBUTE_LOADS:
        at += 1
    arguments = after[at : at + 3]
    if len(arguments) < 2 or arguments[0].opname != "LOAD_CONST" or not isinstance(arguments[0].argval, str):
        return None
    has_default = arguments[1].opname.startswith("LOAD")
    call = arguments[-1] if has_default else arguments[1]
    return {arguments[0].argval} if call.opname.startswith("CALL") and call.arg == 2 + has_default else None
