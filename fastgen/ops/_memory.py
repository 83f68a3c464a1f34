"""What is decided once for each kind of call: an op's decisions in Python take longer than a small image's
convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastgen.ops._settings import Setting

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST = 4096  # entries; more kinds of calls than a process has, unless its sizes never repeat
_memories: list[dict[tuple, Any]] = []
# A thread that sets one is asked everything anew: see _choices.recorded.
recorder: Setting[dict | None] = Setting("recorder", None)


def remembered(function: F) -> F:
    """The function with a memory for what it returned for the arguments of each call.

    Its results must depend on nothing else; when that changes, `forget`. torch.compile sees the function alone, and so
    does a call whose arguments have no hash, as lists and the symbolic sizes of a traced graph.
    """
    known: dict[tuple, Any] = {}
    _memories.append(known)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (recorder.used and recorder.get() is not None):
            return function(*args)
        try:
            return known[args]
        except (KeyError, TypeError):
            pass
        found = function(*args)
        try:
            if len(known) >= _LARGEST:
                known.clear()
            known[args] = found
        except TypeError:
            pass
        return found

    return run  # type: ignore[return-value]


def constant(function: F) -> F:
    """torch.compile takes what the function returns for a constant of the graph.

    As torch.compiler.assume_constant_result, which imports torch._dynamo: with it, this package would take twice as
    long.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def forget() -> None:
    """Empties the memory of every function."""
    for known in _memories:
        known.clear()
