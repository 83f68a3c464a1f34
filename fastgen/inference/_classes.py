"""The classes that fuse assigns to modules: subclasses of the originals that compute the same in fewer passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen.inference._runs import Run, is_plain, kind
from fastgen.nn import Sequential


class Group:
    """Runs that share members, and the slots (parent, name, member) that their members were in when fuse saw them.

    The slots include those of other modules whose classes the analysis relied on.
    """

    def __init__(self, slots: tuple[tuple[nn.Module, str, nn.Module], ...]):
        self.slots = slots

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is in the group (a replica is not) and all modules are still plain and in their slots.

        If not, each module of the group computes its own part.
        """
        is_member = False
        for parent, name, member in self.slots:
            if parent._modules.get(name) is not member or not is_plain(member):
                return False
            is_member = is_member or member is module
        return is_member


class _FusedClass(nn.Module):
    """Base of the classes made here. They have the name of the original class and are pickled under it."""

    stands_for: type[nn.Module]
    mixin: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        return (_new, (self.stands_for, self.mixin), *reduced[2:])


class FusedSequential(_FusedClass):
    """nn.Sequential, or a subclass with the same forward, that computes runs by one op: see fastgen.nn.Sequential."""

    forward = Sequential.forward


class FusedMember(_FusedClass):
    """A member of a run: the first one computes the whole run, the others return their input."""

    _fastgen: tuple[Group, Run | None]  # the first member has the run, the others have None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        group, run = self._fastgen
        if not isinstance(input, Tensor) or not group.holds(self):
            return super().forward(input, *args, **kwargs)
        if not (args or kwargs):
            return input if run is None else run.compute(input)
        output = super().forward(input, *args, **kwargs)  # accepted by a convolution with output_size; others raise
        for member in run.members[1:] if run is not None else ():
            output = kind(member).forward(member, output)
        return output


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _fused_class(base: type[nn.Module], mixin: type[_FusedClass]) -> type[nn.Module]:
    if (base, mixin) not in _classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[base, mixin] = type(base.__name__, (mixin, base), {**names, "stands_for": base, "mixin": mixin})
    return _classes[base, mixin]


def _new(base: type[nn.Module], mixin: type[_FusedClass]) -> nn.Module:
    """An uninitialized module, for unpickling."""
    cls = _fused_class(base, mixin)
    return cls.__new__(cls)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes cls the module's class. A parametrized module keeps the class of its parametrizations, now derived from
    cls."""
    current = type(module)
    if current.__module__ == "torch.nn.utils.parametrize":
        attributes = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
        cls = type(current.__name__, (cls,), attributes)
    module.__class__ = cls


def fuse_sequential(module: nn.Module) -> None:
    _set_class(module, _fused_class(kind(module), FusedSequential))


def fuse_run(run: Run, group: Group) -> None:
    for member in run.members:
        if not isinstance(member, FusedMember):
            _set_class(member, _fused_class(kind(member), FusedMember))
        member.__dict__["_fastgen"] = (group, run if member is run.members[0] else None)


def unfuse(model: nn.Module) -> None:
    """Restores the original class of every module."""
    for module in model.modules():
        if isinstance(module, _FusedClass):
            module.__dict__.pop("_fastgen", None)
            _set_class(module, kind(module))
