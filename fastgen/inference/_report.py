"""fusion_report(model): what is fused in a model, what could be fused, and why the rest is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastgen.inference._analysis import Analysis, analyze
from fastgen.inference._runs import Run, first_run, is_plain, kind
from fastgen.nn import Reparameterize, Sequential
from fastgen.nn.spectral_norm import OldSpectralNorm, SpectralNorm, forms

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class FusedRun:
    """Modules that one op computes, by their names in the model."""

    names: tuple[str, ...]
    op: str  # of fastgen.ops
    kinds: tuple[str, ...]  # the modules' classes
    note: str = ""  # why the run ends without an activation, if one could follow


@dataclass(frozen=True)
class Unfused:
    """A module that is not fused, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What is fused in a model, what fuse would fuse, and what it would not. str() of it is a table."""

    fused: tuple[FusedRun, ...]
    fusable: tuple[FusedRun, ...]
    left: tuple[Unfused, ...]
    swapped: tuple[FusedRun, ...] = ()  # weights that spectral_norm computes, and the samplers that the model declares
    swappable: tuple[FusedRun, ...] = ()  # weights that spectral_norm could compute

    def __str__(self) -> str:
        sections: list[tuple[str, list[tuple[str, ...]]]] = []
        for title, runs in (
            ("fused", self.fused), ("fusable", self.fusable), ("swapped", self.swapped), ("swappable", self.swappable)
        ):  # fmt: skip
            rows: list[tuple[str, ...]] = [
                (" + ".join(run.names), f"{run.op}: {' + '.join(run.kinds)}", run.note) for run in runs
            ]
            sections.append((title, rows))
        sections.append(("left alone", [(left.name, left.reason) for left in self.left]))
        lines = []
        for title, rows in sections:
            if rows:
                widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
                lines.append(f"{title} ({len(rows)})")
                for row in rows:
                    lines.append("  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
        if not (self.fused or self.fusable or self.swapped or self.swappable):
            lines.insert(0, "nothing to fuse")
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Tells what is fused in the model, what fuse(model) would fuse in it now, and which of its convolutions, norms,
    activations and forwards would not be fused, with the reasons.

    The model is not changed. Raises TypeError if model is not an nn.Module.
    """
    check_module(model)
    analysis = analyze(model)
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[bool, Run, tuple[str, ...]]] = []
    for run in analysis.runs:
        is_fused = run in vars(run.members[0]).get("_fastgen", ())
        found.append((is_fused, run, tuple(names[member] for member in run.members)))
    for sequential, runs in analysis.sequentials.items():
        found.extend((type(sequential).forward is Sequential.forward, *run) for run in runs)
    # A module may have several names.
    order = {name: at for at, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    entries: dict[bool, list[FusedRun]] = {True: [], False: []}
    members: set[nn.Module] = set()
    for is_fused, run, run_names in found:
        if run.members[0] not in members:  # otherwise it was found in an outer Sequential
            members.update(run.members)
            entries[is_fused].append(_entry(run, run_names, analysis.notes.get(run, "")))
    for runs_found in entries.values():
        runs_found.sort(key=lambda run: order[run.names[0]])
    left = [
        Unfused(name, _reason(module, name, model, analysis))
        for module, name in names.items()
        if module not in members and _is_of_interest(module, analysis)
    ]
    return FusionReport(tuple(entries[True]), tuple(entries[False]), tuple(left), *_swaps(model))


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _entry(run: Run, names: tuple[str, ...], note: str) -> FusedRun:
    op = "norm_act"
    if run.convolution is not None:
        op = f"conv{'_transpose' if kind(run.convolution) is nn.ConvTranspose2d else ''}2d_norm_act"
    return FusedRun(names, op, tuple(kind(member).__name__ for member in run.members), note)


def _swaps(model: nn.Module) -> tuple[tuple[FusedRun, ...], tuple[FusedRun, ...]]:
    """(swapped, swappable): spectrally normalized weights and declared samplers, which are not runs of modules."""
    swaps: dict[bool, list[FusedRun]] = {True: [], False: []}
    for name, module in model.named_modules():
        for parameter, form in forms(module):
            is_swapped = isinstance(form, (SpectralNorm, OldSpectralNorm))
            names = (f"{name}.{parameter}" if name else parameter,)
            swaps[is_swapped].append(FusedRun(names, "spectral_norm", (kind(module).__name__,)))
        if isinstance(module, Reparameterize):
            swaps[True].append(FusedRun((name,), "reparameterize", (type(module).__name__,)))
    return tuple(swaps[True]), tuple(swaps[False])


def _is_of_interest(module: nn.Module, analysis: Analysis) -> bool:
    """Whether the report should say why this module is not in a run."""
    in_torch = {cls.__module__ for cls in type(module).__mro__}
    return (
        module in analysis.untraced
        or isinstance(module, (_CONVOLUTIONS, *_NORMS))
        or "torch.nn.modules.activation" in in_torch
    )


def _reason(module: nn.Module, name: str, model: nn.Module, analysis: Analysis) -> str:
    """Why the module, which has this name in the model, is not in a run."""
    if isinstance(module, torch.jit.ScriptModule):
        return analysis.untraced[module]
    if not is_plain(module):
        return "it has hooks or a replaced forward, which fusing would bypass"
    cls = kind(module)
    if not cls.__module__.startswith("torch."):
        known = next((base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.")), nn.Module)
        if known is not nn.Module:
            return f"{cls.__name__} is a subclass of {known.__name__} and may compute something else"
    elif module not in analysis.untraced and not any(
        first_run(pair) for pair in ([module, nn.ReLU()], [nn.BatchNorm2d(1), module])
    ):
        return f"no op computes a {cls.__name__} like this one"
    if module in analysis.left:
        return analysis.left[module]
    if module in analysis.untraced:
        return analysis.untraced[module]
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if parent in analysis.untraced:
            return f"it is in {name or type(parent).__name__}: {analysis.untraced[parent]}"
    if module not in analysis.sites and module is not model:  # the user calls the model
        return "no forward calls it"
    if isinstance(module, (_CONVOLUTIONS, *_NORMS)):
        return "no activation or norm that can be fused comes right after it"
    return "no convolution or norm that can be fused comes right before it"
