"""The errors that fastgen raises for users' mistakes; the command line turns each into one line and an exit code."""

import contextlib
import os
from collections.abc import Iterable, Iterator


class FastgenError(RuntimeError):
    """Something failed that the user can fix (a file, a folder, a build); the command line exits with 1."""


class UsageError(ValueError):
    """An argument that can never be valid; the command line exits with 2."""


class CheckpointError(FastgenError):
    """A checkpoint is missing, damaged, or of another architecture."""


class DataError(FastgenError):
    """A data set is missing, empty, or not what the model needs."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds `path` to an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch (whose CPU allocator has no error class of its own) ran out of memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def unknown_name(kind: str, name: object, names: Iterable[str], note: str = "") -> UsageError:
    """The error for a name that is not in `names`. It lists the nearest names, then all of them, and ends with
    `note`."""
    import difflib

    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}choose from: {', '.join(names)}{note}")
