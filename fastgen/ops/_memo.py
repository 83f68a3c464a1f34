"""Memoizes decisions per kind of call: without it, an op's decisions in Python take longer than a small convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST = 4096  # entries: more kinds of calls than a process makes, unless its sizes never repeat
_caches: list[dict[tuple, Any]] = []


def memoize(function: F) -> F:
    """The function with a cache of its results by arguments.

    Its results must depend on nothing else; if something else changes, call `forget`. The cache is bypassed under
    torch.compile and for arguments that cannot be hashed, such as lists and the symbolic sizes of a traced graph.
    """
    results: dict[tuple, Any] = {}
    _caches.append(results)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return results[args]
        except (KeyError, TypeError):
            pass
        result = function(*args)
        try:
            if len(results) >= _LARGEST:
                results.clear()
            results[args] = result
        except TypeError:
            pass
        return result

    return run  # type: ignore[return-value]


def dynamo_constant(function: F) -> F:
    """Marks a function whose result torch.compile treats as a constant of the graph.

    This is torch.compiler.assume_constant_result, which imports torch._dynamo: with it, this package would take twice
    as long to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def forget() -> None:
    """Empties the caches of all memoized functions."""
    for results in _caches:
        results.clear()
