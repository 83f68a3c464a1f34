"""Checks of options that are fields of a frozen dataclass: the settings of a run, the sizes of a model. No torch here:
the command line's help reads the settings."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import typing
from typing import Any, Literal

from fastgen.errors import UsageError

MAX_SIZE = 2**16
"""Greatest value of an integer that has no range of its own."""
_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


def check_options(options: Any) -> None:
    """Checks each field of a dataclass by its annotation, and numbers by their ranges.

    `ranges` of the class and of the classes above it map names to (least, greatest). An integer without a range must be
    between 1 and MAX_SIZE. Fields of other types than int, float, bool, str and Literal are left to the class.

    Raises:
        UsageError: names the field, what is allowed and what was found.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for kind in reversed(type(options).__mro__):
        ranges |= vars(kind).get("ranges", {})
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        name, kind, value = field.name, hints[field.name], getattr(options, field.name)
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            is_choice = any(type(value) is type(choice) and value == choice for choice in choices)  # 1 is not True
            require(options, name, is_choice, f"one of {', '.join(map(str, choices))}")
        elif kind in _KINDS:
            require(options, name, _is(value, kind), _KINDS[kind])
            if kind is int or name in ranges:
                least, most = ranges.get(name, (1, MAX_SIZE))
                require(options, name, least <= value <= most, f"between {least} and {most}")


def require(options: Any, name: str, holds: bool, expected: str) -> None:
    """Raises UsageError unless `holds`: the option `name` must be `expected`."""
    if not holds:
        raise UsageError(f"{name} must be {expected}, not {reprlib.repr(getattr(options, name))}")


def with_current_names(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options by their current names: `kind.renamed` maps names of older versions, which saved runs still have."""
    renamed: dict[str, str] = getattr(kind, "renamed", {})
    current = {name: renamed.get(name, name) for name in options}
    return {name if current[name] in options else current[name]: value for name, value in options.items()}


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
    return type(value) is kind
