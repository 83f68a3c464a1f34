"""The implementation that the user requests: by use_impl, otherwise by the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastgen.errors import UsageError
from fastgen.ops._settings import Setting
from fastgen.ops._tiers import TIERS

IMPLEMENTATIONS = tuple(TIERS)
override = Setting("impl", "auto")  # set by use_impl


def checked(impl: str, source: str) -> str:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise UsageError(f"{source}: unknown implementation {impl!r}: choose from: auto, {', '.join(IMPLEMENTATIONS)}")
    return impl


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """A context in which every op whose `impl` is "auto" runs this implementation, or raises with the reason why it
    cannot.

    Like torch.autocast, it applies to the calling thread and the backward passes that this thread starts. Threads
    started within it, such as nn.DataParallel's, begin with auto; FASTGEN_IMPL applies to the whole process. Raises
    UsageError for an unknown name.
    """
    with override.set_to(checked(impl, "use_impl")):
        yield


def requested_impl() -> str:
    """The implementation requested by use_impl or the environment, or "auto"."""
    impl = override.get()
    return requested_by_environment() if impl == "auto" else impl


def requested_by_environment() -> str:
    return os.environ.get("FASTGEN_IMPL", "auto")
