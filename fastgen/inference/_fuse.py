"""fuse(model): runs a model's modules by fastgen's fused ops."""

from __future__ import annotations

import logging
from collections import defaultdict

from torch import nn

from fastgen.inference._analysis import analyze
from fastgen.inference._classes import Group, fuse_run, fuse_sequential, unfuse
from fastgen.inference._report import check_module
from fastgen.inference._runs import Run
from fastgen.inference._sandbox import M, clone
from fastgen.nn import Sequential
from fastgen.nn.spectral_norm import adopt, forms

_log = logging.getLogger("fastgen")


def fuse(model: M, *, inplace: bool = False, memory_efficient: bool = False) -> M:
    """Returns the model with each run Conv2d or ConvTranspose2d -> norm -> activation, or norm -> activation, computed
    by one op.

    Modules stay where they are, as instances of their classes (or of subclasses of the same name), with their
    parameters, buffers and names: the state_dict, optimizers, initialisation, .to(), copy.deepcopy, pickling and DDP
    see no change, and training continues as before. The model's own forward keeps running. Whatever cannot be fused
    stays exactly as it was: fusion_report says what and why.

    Two kinds of runs are fused: runs within a Sequential (or a subclass with the same forward; nested plain Sequentials
    included), and runs whose members are called by one function, if on every path through every forward that calls them
    the output of each member goes to the next one and nowhere else. To find these, the forwards are traced by torch.fx
    on copies, with their submodules as leaves.

    On the CPU, the original modules run at each call whose convolution is so small that calling an op would take
    longer, unless an implementation is requested.

    Weights under torch.nn.utils.parametrizations.spectral_norm or torch.nn.utils.spectral_norm are computed by one op,
    with the same vectors, steps and names. A sampler, mu + std * noise, is one op if the model declares it with
    fastgen.nn.Reparameterize; a sampler that is written out in a forward stays as it is.

    Afterwards, parameters, options, train() and eval(), hooks and parametrizations may change and modules may be
    replaced at any time; a run with a member that has hooks or was replaced runs its modules one by one. (Hooks that
    compute a convolution's weight are called before the op: torch.nn.utils.spectral_norm, weight_norm, prune.) Other
    things must not change. Outside of a Sequential, the members of a run must be called by the functions that called
    them when the model was fused (a first member that is called alone computes the whole run), and flags that a forward
    reads must select the same path: to change them, set them and fuse again. A Sequential under torch.utils.checkpoint
    may update the running statistics of its last norm only once, and not again during recomputation; a forward that
    raises between the members of a run has already updated the statistics.

    TorchScript modules stay as they are. torch.jit.script does not accept a fused model; torch.compile, torch.export
    and torch.jit.trace do.

    Do not call it while another thread runs a model: tracing changes how modules are called.

    Args:
        model: any module. A fused model is analyzed again.
        inplace: change the model itself; otherwise a copy is changed and returned.
        memory_efficient: recompute fused convolutions in the backward pass instead of keeping their outputs. On
            a CPU, training steps of three networks then had an 18 to 34 % lower peak of memory and took 25 to 44 %
            longer (channels_last, benchmarks/results/cpu.md).

    Returns the fused model. A model with nothing to fuse is returned unchanged (as a copy, unless inplace), with a
    warning to the logger "fastgen". Raises TypeError if model is not an nn.Module, and what copy.deepcopy raises.
    """
    check_module(model)
    if not inplace:
        model = clone(model)
    analysis = analyze(model)
    unfuse(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.__dict__.pop("memory_efficient", None)
            if memory_efficient:
                module.__dict__["memory_efficient"] = True
    swaps = [(module, *form) for module in model.modules() for form in forms(module)]
    for swap in swaps:
        adopt(*swap)
    for sequential in analysis.sequentials:
        if type(sequential).forward is not Sequential.forward:
            fuse_sequential(sequential)
    slots: dict[nn.Module | None, tuple] = {}
    for parent in model.modules():
        slots.update((child, (parent, name, child)) for name, child in parent._modules.items())
    for runs in _groups(analysis.runs):
        members = dict.fromkeys(member for run in runs for member in run.members)
        for owner, rejecting in analysis.rejecting.items():
            if not members.keys().isdisjoint(owner.modules()):
                members |= dict.fromkeys(rejecting)
        group = Group(tuple(slots[member] for member in members))
        for run in runs:
            fuse_run(run, group)
    if not analysis.sequentials and not analysis.runs and not swaps:
        _log.warning("fuse: %s has nothing to fuse; fastgen.fusion_report says why", type(model).__name__)
    return model


def _groups(runs: list[Run]) -> list[list[Run]]:
    """The runs in groups: runs that share an activation are in the same group."""
    groups: dict[nn.Module, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.members[-1]].append(run)
    return list(groups.values())
