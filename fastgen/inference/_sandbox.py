"""Runs a model without changing it: copies of the model and its inputs, and random number generators that are
restored."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Inputs: TypeAlias = tuple[Tensor, ...]
M = TypeVar("M", bound=nn.Module)


def clone(model: M, *, share_parameters: bool = False) -> M:
    """copy.deepcopy that also handles modules that keep a computed tensor, as the old spectral_norm does.

    share_parameters: the copy has the model's own parameters, and what fuse attached to its modules.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
        if share_parameters and "_fastgen" in vars(module):
            memo[id(module._fastgen)] = module._fastgen
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    with torch.inference_mode(False):  # a copy made in inference mode could not be trained afterwards
        return copy.deepcopy(model, memo)


def copy_inputs(inputs: Iterable[Any]) -> tuple[Any, ...]:
    """The inputs with copies of the tensors, for a module that may write into them."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


@contextlib.contextmanager
def preserved_rng() -> Iterator[Callable[[], bool]]:
    """A context that restores the random number generators. Yields a function that tells whether they were used."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def was_used() -> bool:
        numpy_was_used = numpy and pickle.dumps(numpy.random.get_state()) != pickle.dumps(before[2])
        torch_was_used = not torch.equal(torch.get_rng_state(), before[1])
        return bool(numpy_was_used) or random.getstate() != before[0] or torch_was_used

    try:
        yield was_used
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if numpy:
            numpy.random.set_state(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
