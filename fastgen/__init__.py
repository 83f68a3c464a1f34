"""fastgen: fast convolutional image generators in PyTorch.

Every name is loaded on first use: `import fastgen` costs nothing, compiles nothing and needs no torch.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "create_model": "fastgen.models",
    "list_models": "fastgen.models",
    "load_checkpoint": "fastgen.models",
    "use_impl": "fastgen.ops",
    "info": "fastgen.ops",
    "fuse": "fastgen.inference",
    "fusion_report": "fastgen.inference",
    "Engine": "fastgen.inference",
    "tune": "fastgen.inference",
    "explain": "fastgen.inference",
}
_SUBMODULES = {
    "cli",
    "data",
    "errors",
    "inference",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "runtime",
    "training",
    "tasks",
}
__all__ = ["__version__", *sorted(_EXPORTS), *sorted(_SUBMODULES)]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastgen.{name}")
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__():
    return __all__
