"""Which runs of modules fuse in a model, and why the rest does not."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fastgen.inference._arguments import UntraceableError
from fastgen.inference._bytecode import OURS, Uses, decorated, methods, uses, where
from fastgen.inference._members import Run
from fastgen.inference._trace import Trace, trace
from fastgen.nn import Sequential, _patterns

_CONVOLUTIONS = nn.modules.conv._ConvNd
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class Plan:
    """What fuse does to a model."""

    # Sequentials with runs, and of these the members' names.
    sequentials: dict[nn.Sequential, list[tuple[Run, tuple[str, ...]]]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)  # the others
    notes: dict[Run, str] = field(default_factory=dict)  # what ends a run without an activation
    untraced: dict[nn.Module, str] = field(default_factory=dict)  # modules whose forward is not known, and why
    left: dict[nn.Module, str] = field(default_factory=dict)  # modules called outside of runs, and why
    # The runs or, for None, the single calls in which each module was found.
    sites: dict[nn.Module, set[Run | None]] = field(default_factory=lambda: defaultdict(set))
    # By module: those under it that its forward calls, on some path, with what they do not take. Others in their place
    # may.
    refusing: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)

    def leave(self, module: nn.Module, reason: str) -> None:
        self.sites[module].add(None)
        if reason:
            self.left.setdefault(module, reason)


def make(model: nn.Module) -> Plan:
    """Analyses the model, which stays as it is.

    What a Sequential runs is known from its order. Elsewhere a run fuses if at every call of its members, in every
    forward in the model and on every path through it, the same members follow each other, called by one function.
    """
    plan, traces = Plan(), {}
    scripted: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            if module not in scripted:
                plan.untraced[module] = "it is TorchScript, which runs its own code: fuse what it was made from"
            scripted.update(module.modules())
            continue
        forward = inspect.getattr_static(type(module), "forward")  # a ScriptModule's is a descriptor that fails
        if not is_sequential(module) and not str(getattr(forward, "__module__", "")).startswith(OURS):
            try:
                traces[module] = trace(module)
            except UntraceableError as error:
                plan.untraced[module] = f"its forward cannot be traced: {error}"
    for module, found in traces.items():
        if found.refusing:
            plan.refusing[module] = [module.get_submodule(path) for path in found.refusing]
        for graph in found.graphs:
            _traced_runs(module, graph, found, plan)
    called: set[nn.Module] = set(plan.sites)
    for name, module in model.named_modules():
        if is_sequential(module):
            if _is_called(name, model, called, traces):
                called.add(module)
            runs = list(_sequential_runs(module, f"{name}." if name else "", module in called, plan))
            if runs:
                plan.sequentials[module] = runs
    _forbid_other_callers(model, traces, plan)
    _settle(plan)
    return plan


def is_sequential(module: nn.Module) -> bool:
    """Whether the module is a Sequential that calls its children in turn, fused already or not."""
    forwards = (nn.Sequential.forward, Sequential.forward)
    return isinstance(module, nn.Sequential) and type(module).forward in forwards and "forward" not in vars(module)


def _is_called(name: str, model: nn.Module, called: set[nn.Module], traces: dict[nn.Module, Trace]) -> bool:
    """Whether the Sequential of this name may be called, and not only its children be, by the module that it is in."""
    module, above = model.get_submodule(name), name
    while above:
        above = above.rpartition(".")[0]
        owner = model.get_submodule(above)
        if owner in traces or is_sequential(owner):
            return module in called or (owner not in traces and owner in called)
        if not isinstance(owner, nn.ModuleList | nn.ModuleDict):
            return True
    return True


def _sequential_runs(
    module: nn.Sequential, prefix: str, is_called: bool, plan: Plan
) -> Iterator[tuple[Run, tuple[str, ...]]]:
    names, modules = zip(*_patterns.steps(module, prefix), strict=True) if len(module) else ((), ())
    at = 0
    while at < len(modules):
        *members, end = _patterns.fusable(modules, at)
        run = Run(*members) if end > at else None
        for member in modules[at : max(end, at + 1)] if is_called else ():
            plan.sites[member].add(run)
        if run:
            yield run, names[at:end]
        at = max(end, at + 1)


def _traced_runs(module: nn.Module, graph: fx.Graph, found: Trace, plan: Plan) -> None:
    done: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module" and node not in done:
            chain, stop = _chain(node, found)
            modules = [module.get_submodule(str(link.target)) for link in chain]
            *members, end = _patterns.fusable(modules, 0)
            if not end:
                begins = _patterns.fusable([modules[0], nn.ReLU()], 0)[3] > 0
                plan.leave(modules[0], stop if begins and len(chain) == 1 else "")
                continue
            run = Run(*members)
            done.update(chain[:end])
            for member in run.members:
                plan.sites[member].add(run)
            if run not in plan.runs:
                plan.runs.append(run)
            if run.activation is None and end == len(chain):
                plan.notes[run] = stop


def _chain(node: fx.Node, found: Trace) -> tuple[list[fx.Node], str]:
    """Up to three calls of modules from this one on, each on the output of the one before alone; and what ends them."""
    chain = [node]
    if node in found.direct:
        return chain, "its forward is called, and not the module"
    if len(node.args) != 1 or node.kwargs:
        return chain, "it is called with more than its input"
    while len(chain) < 3:
        last, users = chain[-1], list(chain[-1].users)
        if last in found.kept:
            return chain, "its output is stored"
        if len(users) != 1:
            return chain, f"its output is used in {len(users)} places"
        user = users[0]
        if user.op != "call_module":
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", user.target)
            return chain, "its output is returned" if user.op == "output" else f"its output goes to the function {name}"
        if user.args != (last,) or user.kwargs:
            return chain, f"its output goes to {user.target}, which is called with more than that"
        if user in found.direct:
            return chain, f"its output goes to {user.target}, whose forward is called, and not the module"
        if found.places[user] != found.places[last]:
            return chain, f"its output goes to {user.target}, called by another function, mode or checkpoint"
        chain.append(user)
    return chain, ""


def _forbid_other_callers(model: nn.Module, traces: dict[nn.Module, Trace], plan: Plan) -> None:
    """Leaves the modules alone that methods name which no traced forward ran: they may call them by themselves."""
    ran: dict[nn.Module | None, set[tuple]] = defaultdict(set)
    for module, found in traces.items():
        for path, function in found.ran:
            ran[None if path is None else module.get_submodule(path)].add(function)
    members = {member for run in plan.runs for member in run.members}
    for module in model.modules():
        functions = [*methods(type(module)), *(f for value in vars(module).values() for f in decorated(value))]
        unseen = [f.__code__ for f in functions if where(f.__code__) not in ran[module] | ran[None]]
        for names, member in _attributes(module) if unseen else ():
            for code in unseen:
                if member in members and _may_use(uses(code), names, code.co_name):
                    plan.leave(member, f"{type(module).__name__}.{code.co_name} uses it too, in a way not known")


def _attributes(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """The modules under this one, with the names by which attributes lead to them; containers' children may have
    none."""
    for path, member in module.named_modules(remove_duplicate=False):
        names, at = [], module
        for name in path.split(".") if path else ():
            if not (name.isdigit() or isinstance(at, _CONTAINERS)):
                names.append(name)
            at = at.get_submodule(name)
        yield names, member


def _may_use(uses: Uses, names: list[str], method: str) -> bool:
    if uses.by_name and method != "__getattr__":  # which hands out what others use
        return True
    return uses.loaded.issuperset(names) and (names[-1] in uses.used if names else uses.by_index)


def _settle(plan: Plan) -> None:
    """Shortens or drops runs until all calls of each member are in them, those of a convolution or norm in one
    alone."""
    at = 0
    while at < len(plan.runs):
        run, short = plan.runs[at], _settled(plan.runs[at], plan)
        at += 1
        if short == run:
            continue
        plan.runs.remove(run)
        if short and short not in plan.runs:
            plan.runs.append(short)
            plan.notes[short] = plan.notes.get(run, "")
        for module in run.members:
            plan.sites[module].discard(run)
            if short and module in short.members:
                plan.sites[module].add(short)
            else:
                plan.leave(module, "it, or the module beside it, is also called where they are not one run")
        at = 0


def _settled(run: Run, plan: Plan) -> Run | None:
    """What all calls of the run's norm have in common, less what is also called elsewhere; None: nothing that fuses."""
    convolution, norm, activation = run
    sites = plan.sites[norm if norm is not None else run.members[0]]
    if not all(site in plan.runs for site in sites):
        return None
    same_convolution = all(site and site.convolution is convolution for site in sites)
    same_activation = all(site and site.activation is activation for site in sites)
    if convolution and not (same_convolution and all(site in sites for site in plan.sites[convolution])):
        convolution = None
    if activation and not (same_activation and all(site in plan.runs for site in plan.sites[activation])):
        activation = None
    short = Run(convolution, norm, activation)
    return short if len(short.members) > 1 else None


def is_of_interest(module: nn.Module, plan: Plan) -> bool:
    """Whether a report should say why this module is in no run."""
    in_torch = {cls.__module__ for cls in type(module).__mro__}
    return (
        module in plan.untraced
        or isinstance(module, (_CONVOLUTIONS, *_NORMS))
        or "torch.nn.modules.activation" in in_torch
    )


def reason(module: nn.Module, name: str, model: nn.Module, plan: Plan) -> str:
    """Why the module, of this name in the model, is in no run."""
    if isinstance(module, torch.jit.ScriptModule):
        return plan.untraced[module]
    if not _patterns.is_plain(module):
        return "it has hooks or a replaced forward, which fusing would bypass"
    kind = _patterns.kind(module)
    if not kind.__module__.startswith("torch."):
        known = next((cls for cls in kind.__mro__ if cls.__module__.startswith("torch.nn.modules.")), nn.Module)
        if known is not nn.Module:
            return f"{kind.__name__} is a subclass of {known.__name__} and may compute something else"
    elif module not in plan.untraced and not any(
        _patterns.fusable(pair, 0)[3] for pair in ([module, nn.ReLU()], [nn.BatchNorm2d(1), module])
    ):
        return f"no op computes a {kind.__name__} like this one"
    if module in plan.left:
        return plan.left[module]
    if module in plan.untraced:
        return plan.untraced[module]
    while name:
        name = name.rpartition(".")[0]
        above = model.get_submodule(name)
        if above in plan.untraced:
            return f"it is under {name or type(above).__name__}: {plan.untraced[above]}"
    if module not in plan.sites:
        return "no forward calls it"
    if isinstance(module, (_CONVOLUTIONS, *_NORMS)):
        return "no activation or norm that fuses comes right after it"
    return "no convolution or norm that fuses comes right before it"
