"""fuse(model): the fused ops under anybody's modules."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from fastgen.inference import _members, _plan
from fastgen.inference._members import Group, Run
from fastgen.inference._trace import M, clone
from fastgen.nn import Reparameterize, Sequential, _patterns
from fastgen.nn.spectral_norm import OldSpectralNorm, SpectralNorm, adopt, forms

_log = logging.getLogger("fastgen")


@dataclass(frozen=True)
class FusedRun:
    """Modules that one op computes, by their names in the model."""

    names: tuple[str, ...]
    op: str  # of fastgen.ops
    kinds: tuple[str, ...]
    note: str = ""  # why it ends where it does, when an activation could follow


@dataclass(frozen=True)
class Unfused:
    """A module that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What is fused in a model, what fuse would fuse, and what it leaves alone. str() of it is a table."""

    fused: tuple[FusedRun, ...]
    fusable: tuple[FusedRun, ...]
    left: tuple[Unfused, ...]
    swapped: tuple[FusedRun, ...] = ()  # weights that spectral_norm computes, and the samplers that the model declares
    swappable: tuple[FusedRun, ...] = ()  # weights that it would

    def __str__(self) -> str:
        parts: list[tuple[str, list[tuple[str, ...]]]] = []
        for title, runs in (
            ("fused", self.fused), ("fusable", self.fusable), ("swapped", self.swapped), ("swappable", self.swappable)
        ):  # fmt: skip
            rows: list[tuple[str, ...]] = [
                (" + ".join(run.names), f"{run.op}: {' + '.join(run.kinds)}", run.note) for run in runs
            ]
            parts.append((title, rows))
        parts.append(("left alone", [(left.name, left.reason) for left in self.left]))
        lines = []
        for title, rows in parts:
            if rows:
                widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
                lines.append(f"{title} ({len(rows)})")
                for row in rows:
                    lines.append("  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
        if not (self.fused or self.fusable or self.swapped or self.swappable):
            lines.insert(0, "nothing to fuse")
        return "\n".join(lines)


def fuse(model: M, *, inplace: bool = False, memory_efficient: bool = False) -> M:
    """The model, with each run Conv2d or ConvTranspose2d -> norm -> activation, and norm -> activation, computed by one
    op.

    Modules stay objects of their classes (or of subclasses of the same name) in their places, with their parameters,
    buffers and names: the state_dict, optimizers, initialisation, .to(), copy.deepcopy, pickling and DDP see no change,
    and training goes on as before. The model's own forward keeps running. Whatever is not known to fuse stays exactly
    as it was: fusion_report says what and why.

    Fused are runs within a Sequential (or a subclass with its forward; plain Sequentials in it included), and runs that
    one function calls, where every path through every forward that calls them passes the output of each to the next
    alone. For this the forwards are traced by torch.fx on copies, with their submodules as leaves.

    On the CPU a run whose convolution is so small that an op's way there and back takes longer is left to its modules,
    call by call, unless an implementation is asked for.

    Weights under torch.nn.utils.parametrizations.spectral_norm or torch.nn.utils.spectral_norm are computed by one op,
    with the same vectors, steps and names. A sampler, mu + std * noise, is one op where the model declares it by a
    fastgen.nn.Reparameterize; written out in a forward it stays as it is.

    What holds afterwards: parameters, options, train() and eval(), hooks, parametrizations and replaced modules may
    change at any time; a run with a member that has hooks, or was replaced, computes its modules one by one. (Hooks
    that compute a convolution's weight are called before the op: torch.nn.utils.spectral_norm, weight_norm, prune.)
    What does not: outside a Sequential, the members of a run must be called by the functions that called them when the
    model was fused (a first member called by itself computes the whole run), and flags that a forward reads must lead
    the same way: set them first, then fuse again. A Sequential under torch.utils.checkpoint may update the running
    statistics of its last norm once, not also when it is run again; a forward that raises between the members of a run
    has updated them already.

    TorchScript modules stay as they are, and torch.jit.script does not take a fused model; torch.compile, torch.export
    and torch.jit.trace do.

    Not while another thread runs a model: tracing changes how modules are called.

    Args:
        model: any module. One that is fused already is analysed anew.
        inplace: change the model itself; otherwise a deep copy is made, and the model stays as it is.
        memory_efficient: fused convolutions are computed again in the backward pass instead of keeping their outputs:
            half the activation memory for a third more work in the convolutions.

    Returns the fused model; a model with nothing to fuse comes back unchanged (a copy, unless inplace), and a warning
    to the logger "fastgen" says so. Raises TypeError if model is no nn.Module, and what copy.deepcopy raises.
    """
    _check_module(model)
    if not inplace:
        model = clone(model, share=False)
    plan = _plan.make(model)
    _members.unfuse(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.__dict__.pop("memory_efficient", None)
            if memory_efficient:
                module.__dict__["memory_efficient"] = True
    swaps = [(module, *form) for module in model.modules() for form in forms(module)]
    for swap in swaps:
        adopt(*swap)
    for sequential in plan.sequentials:
        if type(sequential).forward is not Sequential.forward:
            _members.fuse_sequential(sequential)
    slots: dict[nn.Module | None, tuple] = {}
    for parent in model.modules():
        slots.update((child, (parent, name, child)) for name, child in parent._modules.items())
    for runs in _groups(plan.runs):
        members = dict.fromkeys(member for run in runs for member in run.members)
        for owner, refusing in plan.refusing.items():
            if not members.keys().isdisjoint(owner.modules()):
                members |= dict.fromkeys(refusing)
        group = Group(tuple(slots[member] for member in members))
        for run in runs:
            _members.fuse_run(run, group)
    if not plan.sequentials and not plan.runs and not swaps:
        _log.warning("fuse: %s has nothing to fuse; fastgen.fusion_report says why", type(model).__name__)
    return model


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that share an activation, together."""
    groups: dict[nn.Module, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.members[-1]].append(run)
    return list(groups.values())


def fusion_report(model: nn.Module) -> FusionReport:
    """What is fused in the model, what fuse(model) would fuse in it now, and which of its convolutions, norms,
    activations and forwards it leaves alone, with the reasons.

    The model stays as it is. Raises TypeError if model is no nn.Module.
    """
    _check_module(model)
    plan = _plan.make(model)
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[bool, Run, tuple[str, ...]]] = []
    for run in plan.runs:
        is_fused = run in vars(run.members[0]).get("_fastgen", ())
        found.append((is_fused, run, tuple(names[member] for member in run.members)))
    for sequential, runs in plan.sequentials.items():
        found.extend((type(sequential).forward is Sequential.forward, *run) for run in runs)
    order = {
        name: at for at, (name, _) in enumerate(model.named_modules(remove_duplicate=False))
    }  # a module may have several
    entries: dict[bool, list[FusedRun]] = {True: [], False: []}
    members: set[nn.Module] = set()
    for is_fused, run, of in found:
        if run.members[0] not in members:  # else it is the run of a Sequential within that of another
            members.update(run.members)
            entries[is_fused].append(_entry(run, of, plan.notes.get(run, "")))
    for runs_of in entries.values():
        runs_of.sort(key=lambda run: order[run.names[0]])
    left = [
        Unfused(name, _plan.reason(module, name, model, plan))
        for module, name in names.items()
        if module not in members and _plan.is_of_interest(module, plan)
    ]
    return FusionReport(tuple(entries[True]), tuple(entries[False]), tuple(left), *_swaps(model))


def _swaps(model: nn.Module) -> tuple[tuple[FusedRun, ...], tuple[FusedRun, ...]]:
    """What is not a run of modules: spectrally normalized weights, by fastgen's op and not, and declared samplers."""
    swaps: dict[bool, list[FusedRun]] = {True: [], False: []}
    for name, module in model.named_modules():
        for parameter, form in forms(module):
            done = isinstance(form, (SpectralNorm, OldSpectralNorm))
            names = (f"{name}.{parameter}" if name else parameter,)
            swaps[done].append(FusedRun(names, "spectral_norm", (_patterns.kind(module).__name__,)))
        if isinstance(module, Reparameterize):
            swaps[True].append(FusedRun((name,), "reparameterize", (type(module).__name__,)))
    return tuple(swaps[True]), tuple(swaps[False])


def _entry(run: Run, names: tuple[str, ...], note: str) -> FusedRun:
    op = "norm_act"
    if run.convolution is not None:
        op = f"conv{'_transpose' if _patterns.kind(run.convolution) is nn.ConvTranspose2d else ''}2d_norm_act"
    return FusedRun(names, op, tuple(_patterns.kind(member).__name__ for member in run.members), note)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
