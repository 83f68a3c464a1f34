"""The cache folder for builds and for the choices of `fastgen tune`."""

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastgen.errors import FastgenError

logger = logging.getLogger("fastgen")


def cached(name: str) -> Iterator[Path]:
    """The files with this name in the cache folders."""
    return (folder / name for folder in _folders() if os.path.isfile(folder / name))


def _folders() -> list[Path]:
    """The cache folders: the chosen one, and, if that cannot be written, a temporary folder of this user too."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = Path(os.environ.get("FASTGEN_CACHE_DIR") or Path(cache, "fastgen")).absolute()
    existing = next(folder for folder in (chosen, *chosen.parents) if os.path.exists(folder))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return [chosen]
    import tempfile

    fallback = Path(tempfile.gettempdir(), f"fastgen-{os.geteuid()}")
    with contextlib.suppress(OSError):
        fallback.mkdir(mode=0o700, exist_ok=True)
        info = fallback.lstat()  # the name can be guessed: never load from a folder that another user made
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077:
            return [chosen, fallback]
    return [chosen]


@contextlib.contextmanager
def locked() -> Iterator[Path]:
    """The cache folder to write in, locked against other writers; a lock dies with the process that holds it."""
    import fcntl

    folder = _folders()[-1]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that builds or tunes")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    except OSError as error:
        raise FastgenError(f"cannot write in {folder}: {error}") from error
