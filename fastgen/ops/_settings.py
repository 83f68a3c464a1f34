"""Settings that a thread changes for itself, for the duration of a context."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Setting(Generic[T]):
    """A value per thread. If autograd runs a backward pass in another thread, as it does on GPUs, that thread sees the
    value of the thread that started the pass. A new thread begins with the default, as with PyTorch's autocast.
    """

    def __init__(self, name: str, default: T):
        self._key, self._default = f"fastgen.{name}", default
        self.used = False  # whether any thread has ever set it; if not, lookups can be skipped
        self._local = threading.local()  # what torch.compile can read and guard

    def get(self) -> T:
        if not self.used:
            return self._default
        if torch.compiler.is_compiling():
            return getattr(self._local, "value", self._default)
        return torch._C._get_obj_in_tls(self._key) if torch._C._is_key_in_tls(self._key) else self._default

    @contextlib.contextmanager
    def set_to(self, value: T) -> Iterator[None]:
        before = self.get()
        self.used = True
        self._put(value)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, value: T) -> None:
        self._local.value = value
        if not torch.compiler.is_compiling():
            torch._C._stash_obj_in_tls(self._key, value)  # autograd hands it to its threads
