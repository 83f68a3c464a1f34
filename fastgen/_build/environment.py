"""Checks the environment variables that the native libraries read: a value that they would ignore is an error."""

import os

from fastgen.errors import UsageError

_ALLOWED = {
    "FASTGEN_CPU_ISA": ("baseline", "avx2", "avx512"),
    "FASTGEN_AMX": ("0", "emulate"),
    "FASTGEN_WINOGRAD": ("0", "always"),
}


def check() -> None:
    """Raises UsageError that names the variable for a meaningless value. An empty value counts as unset."""
    for name, allowed in _ALLOWED.items():
        value = os.environ.get(name)
        if value and value not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    threads = os.environ.get("FASTGEN_THREADS")
    if threads and not (threads.isdecimal() and int(threads) > 0):
        raise UsageError(f"FASTGEN_THREADS must be a positive integer, got {threads!r}")
