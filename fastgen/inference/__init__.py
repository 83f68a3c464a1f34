"""Speeds up existing models: fuse() for any modules, Engine for inference only, tune() for this machine.

fuse(model) computes each run of modules by one op. From top to bottom:

| file | what it does |
| --- | --- |
| `_fuse` | `fuse`: gives modules the classes below, where the analysis allows it |
| `_report` | `fusion_report`: the same analysis in words |
| `_classes` | the subclasses that compute a whole run, and run the original modules when the model changes |
| `_analysis` | which modules always follow each other: by the order of Sequentials, by traces of other forwards |
| `_trace` | every path through one forward, followed by torch.fx on a copy, with submodules as leaves |
| `_arguments` | what a forward may be called with while it is traced, and which questions about a value are branches |
| `_bytecode` | what tracing cannot see: methods that use a submodule too, and checks such as `is None` |
| `_runs` | a run of modules, as fastgen.nn's patterns find it |

An error in the analysis must only prevent a fusion: code that the analysis does not understand counts as a use of the
output, which forbids the fusion.

Engine(model, example) records what a model computes, and runs the record. From top to bottom:

| file | what it does |
| --- | --- |
| `_engine` | `Engine`: checks the arguments, chooses a backend, compares it with the model |
| `_backends` | a plan, CUDA graphs, or PyTorch with plans for parts of the model: run, parts, save |
| `_planner` | the plan of the whole model, or plans of its largest parts |
| `_record`, `_readers`, `_lower` | calls of PyTorch's functions, how to read each, and the plan's steps for them |
| `_graphs` | the fused model on a GPU, recorded once per batch size |
| `_compare` | whether the backend computes what the model does, up to rounding; state that changes between calls |
| `_call` | a plan called with tensors |

Both use `_sandbox`, which runs a model without changing it. `_tune` measures which implementations are the fastest on
this machine, and `_explain` says which ones a model uses, and why.
"""

from fastgen.inference._backends import Part
from fastgen.inference._engine import Engine
from fastgen.inference._explain import Explained, Explanation, explain
from fastgen.inference._fuse import fuse
from fastgen.inference._report import FusedRun, FusionReport, Unfused, fusion_report
from fastgen.inference._tune import Tuned, TuningReport, tune

__all__ = [
    "Engine",
    "Explained",
    "Explanation",
    "FusedRun",
    "FusionReport",
    "Part",
    "Tuned",
    "TuningReport",
    "Unfused",
    "explain",
    "fuse",
    "fusion_report",
    "tune",
]
