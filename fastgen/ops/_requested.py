"""Which implementation is asked for: by use_impl, then by the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastgen.errors import UsageError
from fastgen.ops._settings import Setting

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")
override = Setting("impl", "auto")  # of use_impl


def checked(impl: str, source: str) -> str:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise UsageError(f"{source}: unknown implementation {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}")
    return impl


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within the context every op whose `impl` is "auto" runs this implementation, or raises with the reason it cannot.

    It holds for the calling thread and the backward passes that it asks for, as torch.autocast does. Threads started
    within it, such as nn.DataParallel's, begin with auto; FASTGEN_IMPL holds for the whole process. Raises UsageError
    for an unknown name.
    """
    with override.set_to(checked(impl, "use_impl")):
        yield


def requested_impl() -> str:
    """The implementation that use_impl or the environment asks for, or "auto"."""
    impl = override.get()
    return requested_by_environment() if impl == "auto" else impl


def requested_by_environment() -> str:
    return os.environ.get("FASTGEN_IMPL", "auto")
