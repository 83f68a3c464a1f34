"""The classes that fuse gives to modules: they are found where the originals were, and compute the same in fewer
passes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgen.nn import Sequential, _patterns, _run


class Run(NamedTuple):
    """Modules that one op computes: each one's output goes to the next alone."""

    convolution: nn.Module | None
    norm: nn.Module | None
    activation: nn.Module | None

    @property
    def members(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self if module is not None)


class Group:
    """Runs that share members, and the slots (parent, name, member) in which their members were when fuse saw them.

    Among the slots are those of modules that are no members but on whose class the runs depend.
    """

    def __init__(self, slots: tuple[tuple[nn.Module, str, nn.Module], ...]):
        self.slots = slots

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is in the group (a replica is not), and all are still in their slots, and plain.

        If not, each module of the group computes its own part.
        """
        is_member = False
        for parent, name, member in self.slots:
            if parent._modules.get(name) is not member or not _patterns.is_plain(member):
                return False
            is_member = is_member or member is module
        return is_member


class _StandIn(nn.Module):
    """Base of the classes made here, which carry the name of the class that they stand for and pickle by it."""

    stands_for: type[nn.Module]
    mixin: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(2, int(protocol)))
        return (_new, (self.stands_for, self.mixin), *made[2:])


class FusedSequential(_StandIn):
    """nn.Sequential, or a subclass with its forward, that runs what fuses as one op: see fastgen.nn.Sequential."""

    forward = Sequential.forward


class Member(_StandIn):
    """A member of a run: the first one computes the whole run, the others hand their input on."""

    _fastgen: tuple[Group, Run | None]  # the run is the first member's

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        group, run = self._fastgen
        if not isinstance(input, Tensor) or not group.holds(self):
            return super().forward(input, *args, **kwargs)
        if not (args or kwargs):
            return input if run is None else _run.run(input, *run)
        output = super().forward(input, *args, **kwargs)  # a convolution with output_size; others raise
        for member in run.members[1:] if run is not None else ():
            output = _patterns.kind(member).forward(member, output)
        return output


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _class(base: type[nn.Module], mixin: type[_StandIn]) -> type[nn.Module]:
    if (base, mixin) not in _classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[base, mixin] = type(base.__name__, (mixin, base), {**names, "stands_for": base, "mixin": mixin})
    return _classes[base, mixin]


def _new(base: type[nn.Module], mixin: type[_StandIn]) -> nn.Module:
    cls = _class(base, mixin)
    return cls.__new__(cls)


def _put_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes cls the module's class, below that of its parametrizations if it has some."""
    own = type(module)
    if own.__module__ == "torch.nn.utils.parametrize":
        inside = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        cls = type(own.__name__, (cls,), inside)
    module.__class__ = cls


def fuse_sequential(module: nn.Module) -> None:
    _put_class(module, _class(_patterns.kind(module), FusedSequential))


def fuse_run(run: Run, group: Group) -> None:
    for member in run.members:
        if not isinstance(member, Member):
            _put_class(member, _class(_patterns.kind(member), Member))
        member.__dict__["_fastgen"] = (group, run if member is run.members[0] else None)


def unfuse(model: nn.Module) -> None:
    """Gives every module its own class back."""
    for module in model.modules():
        if isinstance(module, _StandIn):
            module.__dict__.pop("_fastgen", None)
            _put_class(module, _patterns.kind(module))
