"""Which runs of modules fuse in a model, and why the others do not."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fastgen.inference._arguments import UntraceableError
from fastgen.inference._bytecode import LIBRARY, Uses, location, user_functions, user_methods, uses
from fastgen.inference._runs import Run, first_run, steps
from fastgen.inference._trace import Trace, trace
from fastgen.nn import Sequential

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Analysis:
    """What fuse can do to a model."""

    # Sequential -> its runs, and the names of their members in the model.
    sequentials: dict[nn.Sequential, list[tuple[Run, tuple[str, ...]]]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)  # runs outside of Sequentials
    notes: dict[Run, str] = field(default_factory=dict)  # why a run ends without an activation
    untraced: dict[nn.Module, str] = field(default_factory=dict)  # modules whose forward could not be traced, and why
    left: dict[nn.Module, str] = field(default_factory=dict)  # modules called outside of runs, and why
    # Module -> the runs in which its calls were traced, and None for calls outside of runs.
    sites: dict[nn.Module, set[Run | None]] = field(default_factory=lambda: defaultdict(set))
    # Module -> submodules that its forward calls, on some path, with arguments that they do not accept. Modules that
    # replace them later may accept these.
    rejecting: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)

    def leave(self, module: nn.Module, reason: str) -> None:
        """Records that the module is called outside of runs; the first reason is kept."""
        self.sites[module].add(None)
        if reason:
            self.left.setdefault(module, reason)


def analyze(model: nn.Module) -> Analysis:
    """Finds the runs of the model, which is not changed.

    A Sequential calls its children in order. Elsewhere a run is fused if its members follow each other at every call of
    them, in every forward of the model and on every path through it, and the same function calls them all.
    """
    analysis, traces = Analysis(), {}
    scripted: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            if module not in scripted:
                analysis.untraced[module] = "it is TorchScript, which runs its own code: fuse the original module"
            scripted.update(module.modules())
            continue
        forward = inspect.getattr_static(type(module), "forward")  # a ScriptModule's is a descriptor that raises
        if not is_sequential(module) and not str(getattr(forward, "__module__", "")).startswith(LIBRARY):
            try:
                traces[module] = trace(module)
            except UntraceableError as error:
                analysis.untraced[module] = f"its forward cannot be traced: {error}"
    for module, traced in traces.items():
        if traced.rejecting:
            analysis.rejecting[module] = [module.get_submodule(path) for path in traced.rejecting]
        for graph in traced.graphs:
            _find_traced_runs(module, graph, traced, analysis)
    called: set[nn.Module] = set(analysis.sites)
    for name, module in model.named_modules():
        if is_sequential(module):
            if _is_called(name, model, called, traces):
                called.add(module)
            runs = list(_sequential_runs(module, f"{name}." if name else "", module in called, analysis))
            if runs:
                analysis.sequentials[module] = runs
    _leave_members_used_elsewhere(model, traces, analysis)
    _shorten_runs(analysis)
    return analysis


def is_sequential(module: nn.Module) -> bool:
    """Whether the module is a Sequential that calls its children in turn, fused or not."""
    forwards = (nn.Sequential.forward, Sequential.forward)
    return isinstance(module, nn.Sequential) and type(module).forward in forwards and "forward" not in vars(module)


def _is_called(name: str, model: nn.Module, called: set[nn.Module], traces: dict[nn.Module, Trace]) -> bool:
    """Whether the Sequential of this name may be called itself, by the module that holds it, and not only its
    children."""
    module, parent = model.get_submodule(name), name
    while parent:
        parent = parent.rpartition(".")[0]
        owner = model.get_submodule(parent)
        if owner in traces or is_sequential(owner):
            return module in called or (owner not in traces and owner in called)
        if not isinstance(owner, nn.ModuleList | nn.ModuleDict):
            return True
    return True


def _sequential_runs(
    module: nn.Sequential, prefix: str, is_called: bool, analysis: Analysis
) -> Iterator[tuple[Run, tuple[str, ...]]]:
    names, modules = zip(*steps(module, prefix), strict=True) if len(module) else ((), ())
    at = 0
    while at < len(modules):
        run = first_run(modules[at:])
        end = at + (len(run.members) if run else 1)
        for member in modules[at:end] if is_called else ():
            analysis.sites[member].add(run)
        if run:
            yield run, names[at:end]
        at = end


def _find_traced_runs(module: nn.Module, graph: fx.Graph, traced: Trace, analysis: Analysis) -> None:
    done: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module" and node not in done:
            chain, end_reason = _chain(node, traced)
            modules = [module.get_submodule(str(call.target)) for call in chain]
            run = first_run(modules)
            if run is None:
                could_begin = first_run([modules[0], nn.ReLU()]) is not None
                analysis.leave(modules[0], end_reason if could_begin and len(chain) == 1 else "")
                continue
            done.update(chain[: len(run.members)])
            for member in run.members:
                analysis.sites[member].add(run)
            if run not in analysis.runs:
                analysis.runs.append(run)
            if run.activation is None and len(run.members) == len(chain):
                analysis.notes[run] = end_reason


def _chain(node: fx.Node, traced: Trace) -> tuple[list[fx.Node], str]:
    """Up to three calls of modules, starting with this one, each of which gets the output of the previous one as its
    only argument; and why the chain ends."""
    chain = [node]
    if node in traced.direct:
        return chain, "its forward is called directly"
    if len(node.args) != 1 or node.kwargs:
        return chain, "it is called with more than its input"
    while len(chain) < 3:
        last, users = chain[-1], list(chain[-1].users)
        if last in traced.stored:
            return chain, "its output is stored"
        if len(users) != 1:
            return chain, f"its output is used in {len(users)} places"
        user = users[0]
        if user.op != "call_module":
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", user.target)
            return chain, "its output is returned" if user.op == "output" else f"its output goes to the function {name}"
        if user.args != (last,) or user.kwargs:
            return chain, f"its output goes to {user.target}, which is called with other arguments too"
        if user in traced.direct:
            return chain, f"its output goes to {user.target}, whose forward is called directly"
        if traced.contexts[user] != traced.contexts[last]:
            return chain, f"its output goes to {user.target}, called by another function, mode or checkpoint"
        chain.append(user)
    return chain, ""


def _leave_members_used_elsewhere(model: nn.Module, traces: dict[nn.Module, Trace], analysis: Analysis) -> None:
    """Prevents the fusion of modules that are named in a method that no traced forward ran: the method may call them
    separately."""
    executed: dict[nn.Module | None, set[tuple]] = defaultdict(set)
    for module, traced in traces.items():
        for path, function in traced.executed:
            executed[None if path is None else module.get_submodule(path)].add(function)
    members = {member for run in analysis.runs for member in run.members}
    for module in model.modules():
        own = (function for value in vars(module).values() for function in user_functions(value))
        functions = [*user_methods(type(module)), *own]
        seen = executed[module] | executed[None]
        unseen = [function.__code__ for function in functions if location(function.__code__) not in seen]
        for names, member in _attribute_paths(module) if unseen else ():
            for code in unseen:
                if member in members and _may_use(uses(code), names, code.co_name):
                    reason = f"{type(module).__name__}.{code.co_name} uses it too, in an unknown way"
                    analysis.leave(member, reason)


def _attribute_paths(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """The modules in this one, with the names of the attributes that lead to them. Children of containers may have no
    names."""
    for path, member in module.named_modules(remove_duplicate=False):
        names, at = [], module
        for name in path.split(".") if path else ():
            if not (name.isdigit() or isinstance(at, _CONTAINERS)):
                names.append(name)
            at = at.get_submodule(name)
        yield names, member


def _may_use(attributes: Uses, names: list[str], method: str) -> bool:
    if attributes.by_name and method != "__getattr__":  # __getattr__ returns what others use
        return True
    return attributes.loaded.issuperset(names) and (names[-1] in attributes.used if names else attributes.by_index)


def _shorten_runs(analysis: Analysis) -> None:
    """Shortens or drops runs until every call of each member is in a run, and those of a convolution or norm in the
    same run."""
    at = 0
    while at < len(analysis.runs):
        run, short = analysis.runs[at], _shortened(analysis.runs[at], analysis)
        at += 1
        if short == run:
            continue
        analysis.runs.remove(run)
        if short and short not in analysis.runs:
            analysis.runs.append(short)
            analysis.notes[short] = analysis.notes.get(run, "")
        for module in run.members:
            analysis.sites[module].discard(run)
            if short and module in short.members:
                analysis.sites[module].add(short)
            else:
                analysis.leave(module, "it, or the module next to it, is also called outside of this run")
        at = 0


def _shortened(run: Run, analysis: Analysis) -> Run | None:
    """The members that are the same in all calls of the run's norm and are not called elsewhere; None if nothing can be
    fused."""
    convolution, norm, activation = run
    sites = analysis.sites[norm if norm is not None else run.members[0]]
    if not all(site in analysis.runs for site in sites):
        return None
    same_convolution = all(site and site.convolution is convolution for site in sites)
    same_activation = all(site and site.activation is activation for site in sites)
    if convolution and not (same_convolution and all(site in sites for site in analysis.sites[convolution])):
        convolution = None
    if activation and not (same_activation and all(site in analysis.runs for site in analysis.sites[activation])):
        activation = None
    short = Run(convolution, norm, activation)
    return short if len(short.members) > 1 else None
