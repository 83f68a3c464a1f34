"""Training: one loop (`loop.py`), one recipe per system (`recipes/`), a run folder with a resumable checkpoint.

Names are imported on first use, so that the command line's help, which shows the configs, does not import torch.
"""

import importlib

_EXPORTS = {
    "CONFIGS": "fastgen.training.config",
    "DCGANTraining": "fastgen.training.config",
    "TrainConfig": "fastgen.training.config",
    "TrainResult": "fastgen.training.loop",
    "evaluate": "fastgen.training.run",
    "keep_freed_memory": "fastgen.training.memory",
    "load_model": "fastgen.training.run",
    "sample": "fastgen.training.run",
    "train": "fastgen.training.loop",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
