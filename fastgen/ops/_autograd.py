"""Gradients of ops: how they are registered, and that of a backward op, by its formula in differentiable PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_calls: dict[str, Callable] = {}  # by the name of a registered op


def call(name: str, *inputs):
    """torch.ops.fastgen.<name>(*inputs).

    A registered op's gradient is in Python, to which the dispatcher has a long way: a call that nothing else is to see,
    neither a compiler nor a mode, takes the short one.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_tracing()
        or name not in _calls
    ):
        return getattr(torch.ops.fastgen, name).default(*inputs)
    return _calls[name](*inputs)


def transforms() -> bool:
    """Whether the calls under way are to be mapped or differentiated by torch.func, or forward."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register(name: str, backward: Callable, setup_context: Callable) -> None:
    """torch.library.register_autograd for ops without default values and keyword-only arguments.

    An op that takes lists of tensors takes them first, all of one length, and returns such lists. PyTorch's own goes
    through the schema's arguments for default values at each call, whose time grows with the square of their number: 85
    of the 180 microseconds of a small fused convolution; a list costs another 20. Through `call` the transforms of
    torch.func see the gradient too.
    """
    op = getattr(torch.ops.fastgen, name.removeprefix("fastgen::")).default
    kinds = [str(argument.type) for argument in op._schema.arguments]
    tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    lists, returned = kinds.count("List[Tensor]"), len(op._schema.returns)

    # An autograd.Function takes and gives tensors, no lists of them: (other arguments, *tensors).
    def op_of_lists(others, *flat):
        output = op(*split(flat, lists), *others)
        return tuple(output if returned == 1 else itertools.chain(*output))

    def setup_of_lists(ctx, inputs, output):
        others, *flat = inputs
        setup_context(ctx, (*split(flat, lists), *others), nested(output))

    def backward_of_lists(ctx, *grads):
        return None, *itertools.chain(*backward(ctx, *split(grads, returned))[:lists])

    def nested(flat):
        found = split(flat, returned)
        return found[0] if returned == 1 else tuple(found)

    compute, setup = (op_of_lists, setup_of_lists) if lists else (op, setup_context)

    def refuse(*_):
        raise NotImplementedError(
            f"{name} has no forward derivatives: ask for impl='reference', or for 'auto', which takes that then"
        )

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = compute(*inputs)
        setup(ctx, inputs, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_lists if lists else backward)}
    function = type(name.replace("::", "_"), (torch.autograd.Function,), parts)
    # Past Function's own apply, which is for transforms.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    # They ask for the two parts of forward apart.
    parts |= {"forward": staticmethod(lambda *inputs: compute(*inputs)), "setup_context": staticmethod(setup)}
    parts["jvp"] = staticmethod(refuse)
    transformed = type(function.__name__, (torch.autograd.Function,), {**parts, "generate_vmap_rule": True})

    def refuse_duals(inputs):
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
                refuse()

    def run(*inputs):
        """Where the dispatcher comes to, past transforms."""
        if forward_ad._current_level >= 0:
            refuse_duals(inputs)
        if torch._C._are_functorch_transforms_active():
            # As in a compiled graph: this level is the one to differentiate.
            with enable_single_level_autograd_function():
                return differentiable(*inputs)
        return differentiable(*inputs)

    def differentiable(*inputs):
        if torch.is_grad_enabled():
            for i in tensors:
                if inputs[i] is not None and inputs[i].requires_grad:
                    return apply(*inputs)
            flat = list(itertools.chain(*inputs[:lists]))
            if any(t.requires_grad for t in flat):
                return nested(apply(inputs[lists:], *flat))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def start(*inputs):
        if not torch._C._are_functorch_transforms_active():
            return run(*inputs)
        if forward_ad._current_level >= 0:
            refuse_duals(inputs)
        if not lists:
            return transformed.apply(*inputs)
        return nested(transformed.apply(inputs[lists:], *itertools.chain(*inputs[:lists])))

    def mapped(info, in_dims, *inputs):
        """torch.func.vmap, by one call for each of what is mapped."""
        leaves, tree = pytree.tree_flatten(inputs)
        dims = pytree.tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
        each = [leaf.unbind(dim) if dim is not None else (leaf,) * info.batch_size
                for leaf, dim in zip(leaves, dims, strict=True)]  # fmt: skip
        results = [op(*pytree.tree_unflatten(of_one, tree)) for of_one in zip(*each, strict=True)]
        outputs, tree = pytree.tree_flatten(results[0])
        stacked = [torch.stack(of_all) for of_all in zip(*map(pytree.tree_leaves, results), strict=True)]
        return pytree.tree_unflatten(stacked, tree), pytree.tree_unflatten([0] * len(outputs), tree)

    torch.library.impl(name, "Autograd")(run)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"):
        torch.library.register_vmap(name, mapped)
    _calls[name.removeprefix("fastgen::")] = start


def is_wanted(ctx: Any, at: int) -> bool:
    """Whether the backward pass under way is to compute the gradient of an input, the at-th of the tensors.

    Of torch.autograd.grad(inputs=) needs_input_grad knows nothing; PyTorch's own ops leave out what it does not ask
    for.
    """
    if not ctx.needs_input_grad[at]:
        return False
    if torch.compiler.is_compiling():
        return True
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[at][0])
    except RuntimeError:  # a leaf that is asked for
        return True


def split(tensors: Sequence, parts: int) -> list[list]:
    """So many lists of one length."""
    size = len(tensors) // parts
    return [list(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def differentiate(
    formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients that `grads` of formula(*inputs) give its inputs, differentiable in turn where gradients are
    recorded."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: only what the formula itself does with its inputs is differentiated here.
        inputs = [t.view_as(t) if t is not None else None for t in inputs]
        paths = [
            (out, grad)
            for out, grad in zip(formula(*inputs), grads, strict=True)
            if out.requires_grad and grad is not None
        ]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if paths and wanted:
            reached, incoming = zip(*paths, strict=True)
            found = iter(torch.autograd.grad(reached, wanted, incoming, create_graph=higher, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
