"""A library of torch ops: finds it, or builds it at its first use in a process, and reports its status."""

import hashlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgen._build import cache, environment, toolchain
from fastgen.errors import FastgenError

logger = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Status:
    """What `fastgen info` prints about a library."""

    loaded: bool
    reason: str | None  # why it is not loaded
    path: Path | None  # the shared library
    how: str | None  # "ahead of time" or "just in time"
    compiler: str | None


class Library(ABC):
    name: str
    flags: tuple[str, ...]
    headers: tuple[str, ...]  # folders of csrc
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._outcome: Status | None = None  # of the first load() in this process

    @abstractmethod
    def sources(self) -> list[Path]: ...

    @abstractmethod
    def made_for(self) -> tuple[object, ...]:
        """What a just-in-time build depends on besides its digest, PyTorch and the compiler."""

    @abstractmethod
    def compile_into(self, folder: str) -> str:
        """Run the compilers; return the library's path. Raises RuntimeError with all of their output."""

    def obstacle(self) -> str | None:
        """Why it cannot be built here, in one line, or None."""
        return None

    def usable(self) -> bool:
        """Whether this PyTorch could load it."""
        return True

    def load(self) -> str | None:
        """Make the ops available, once per process; return None, or a line that says why they are not."""
        if self._outcome is None:
            with self._lock:
                if self._outcome is None:
                    environment.check()
                    try:
                        self._outcome = self.open_or_build()
                    except FastgenError as error:
                        self._outcome = Status(False, str(error), None, None, toolchain.compiler())
                        self.warn(str(error))
        return self._outcome.reason

    def build(self, force: bool = False, verbose: bool = False) -> Path:
        """Build the library unless it exists, and load it; return its path.

        A build that failed earlier is tried again. `force` always builds again, `verbose` logs a failing compiler's
        whole output. Raises FastgenError with the first compiler error.
        """
        with self._lock:
            found = None if force else next(self._made(), None)
            path, how = found or (self._make(requested=True, force=force, verbose=verbose), "just in time")
            if self._outcome is None or not self._outcome.loaded:
                self._outcome = self.open(path, how)
            return path

    def status(self) -> Status:
        """The library's status; builds and loads nothing."""
        if self._outcome is not None:
            return self._outcome
        if found := next(self._made(), None):
            return Status(False, "not loaded yet", *found, toolchain.compiler())
        reason = self.obstacle() or toolchain.obstacle(self.sources()) or toolchain.remembered_failure(self._key())
        reason = reason or "not built yet: built at first use, or by `fastgen build`"
        return Status(False, reason, None, None, toolchain.compiler())

    def digest(self) -> str:
        """A hash of everything that determines what the library does: sources, headers, flags, machine."""
        folders = [toolchain.CSRC / folder for folder in self.headers]
        return toolchain.digest(self.sources(), self.flags, folders)

    def warn(self, reason: str) -> None:
        """Logs that the ops are not available, if that deserves a warning."""

    def open_or_build(self) -> Status:
        damaged = False
        for path, how in self._made():
            try:
                return self.open(path, how)
            except FastgenError as error:
                logger.warning("%s", error)
                damaged |= how == "just in time"
        path = self._make(force=damaged)
        try:
            return self.open(path, "just in time")
        except FastgenError as error:  # a symbol is missing: remembered, so that the next process does not build again
            path.with_suffix(".failed").write_text(str(error))
            path.unlink()
            raise

    def open(self, path: Path, how: str) -> Status:
        import torch

        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise FastgenError(f"the native ops built {how} do not load: {error.__cause__ or error}") from error
        return Status(True, None, path, how, toolchain.compiler())

    def _made(self) -> Iterator[tuple[Path, str]]:
        """The libraries built from exactly these sources, and how each was built; the ahead-of-time one first."""
        if self.usable() and self.sources():
            ahead = toolchain.PACKAGE.glob(f"_{self.name}_{self.digest()}*.so")
            yield from ((path, "ahead of time") for path in ahead)
            if os.name == "posix" and toolchain.compiler() is not None:
                yield from ((path, "just in time") for path in cache.cached(f"{self._key()}.so"))

    def _make(self, **options: bool) -> Path:
        if obstacle := self.obstacle():
            raise FastgenError(obstacle)
        return toolchain.make(self._key(), self.sources(), self.compile_into, **options)

    def _key(self) -> str:
        """The name of a just-in-time build: the digest, the version of PyTorch, and the compiler."""
        import torch

        made_with = repr((torch.__version__, toolchain.compiler(), *self.made_for()))
        return f"{self.name}-{self.digest()}-{hashlib.sha256(made_with.encode()).hexdigest()[:8]}"
