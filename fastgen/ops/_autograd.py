"""Registers the gradients of ops, and differentiates backward ops through their formulas in differentiable PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_calls: dict[str, Callable] = {}  # name of a registered op -> its short path


def call(name: str, *inputs):
    """torch.ops.fastgen.<name>(*inputs).

    The gradient of a registered op is written in Python, which the dispatcher takes long to reach. A call that no
    compiler, mode or tracer has to see therefore skips the dispatcher.
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
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register(name: str, backward: Callable, setup_context: Callable) -> None:
    """torch.library.register_autograd for ops without default values and keyword-only arguments.

    An op that takes lists of tensors takes them as its first arguments, all of the same length, and returns lists of
    that length. PyTorch's own function searches the schema for default values at each call, in time quadratic in the
    number of arguments: 85 of the 180 microseconds of a small fused convolution; a list costs another 20. Calls through
    `call` are visible to the transforms of torch.func too.
    """
    op = getattr(torch.ops.fastgen, name.removeprefix("fastgen::")).default
    kinds = [str(argument.type) for argument in op._schema.arguments]
    tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    lists, returned = kinds.count("List[Tensor]"), len(op._schema.returns)

    # An autograd.Function takes and returns tensors, not lists of them: (other arguments, *tensors).
    def op_of_lists(others, *flat):
        output = op(*split(flat, lists), *others)
        return tuple(output if returned == 1 else itertools.chain(*output))

    def setup_of_lists(ctx, inputs, output):
        others, *flat = inputs
        setup_context(ctx, (*split(flat, lists), *others), nested(output))

    def backward_of_lists(ctx, *grads):
        return None, *itertools.chain(*backward(ctx, *split(grads, returned))[:lists])

    def nested(flat):
        outputs = split(flat, returned)
        return outputs[0] if returned == 1 else tuple(outputs)

    compute, setup = (op_of_lists, setup_of_lists) if lists else (op, setup_context)

    def refuse(*_):
        raise NotImplementedError(
            f"{name} has no forward derivatives: use impl='reference', or 'auto', which falls back to it"
        )

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = compute(*inputs)
        setup(ctx, inputs, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_lists if lists else backward)}
    function = type(name.replace("::", "_"), (torch.autograd.Function,), parts)
    # Skips Function.apply, which also handles the transforms of torch.func.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    # The transforms need forward and setup_context as separate functions.
    parts |= {"forward": staticmethod(lambda *inputs: compute(*inputs)), "setup_context": staticmethod(setup)}
    parts["jvp"] = staticmethod(refuse)
    transformed = type(function.__name__, (torch.autograd.Function,), {**parts, "generate_vmap_rule": True})

    def refuse_duals(inputs):
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
                refuse()

    def run(*inputs):
        """What the dispatcher calls after the transforms."""
        if forward_ad._current_level >= 0:
            refuse_duals(inputs)
        if torch._C._are_functorch_transforms_active():
            # As in a compiled graph: it is this level that has to be differentiated.
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
        """The batching rule for torch.func.vmap: one call per slice."""
        leaves, tree = pytree.tree_flatten(inputs)
        dims = pytree.tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
        slices = [leaf.unbind(dim) if dim is not None else (leaf,) * info.batch_size
                for leaf, dim in zip(leaves, dims, strict=True)]  # fmt: skip
        results = [op(*pytree.tree_unflatten(slice_leaves, tree)) for slice_leaves in zip(*slices, strict=True)]
        outputs, tree = pytree.tree_flatten(results[0])
        stacked = [torch.stack(values) for values in zip(*map(pytree.tree_leaves, results), strict=True)]
        return pytree.tree_unflatten(stacked, tree), pytree.tree_unflatten([0] * len(outputs), tree)

    torch.library.impl(name, "Autograd")(run)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"):
        torch.library.register_vmap(name, mapped)
    _calls[name.removeprefix("fastgen::")] = start


def needs_gradient(ctx: Any, at: int) -> bool:
    """Whether the current backward pass has to compute the gradient of the at-th tensor of the inputs.

    needs_input_grad does not reflect torch.autograd.grad(inputs=); PyTorch's own ops skip the gradients that it does
    not ask for.
    """
    if not ctx.needs_input_grad[at]:
        return False
    if torch.compiler.is_compiling():
        return True
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[at][0])
    except RuntimeError:  # a leaf whose gradient is requested
        return True


def split(tensors: Sequence, parts: int) -> list[list]:
    """Splits a sequence into `parts` lists of the same length."""
    size = len(tensors) // parts
    return [list(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def differentiate(
    formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the inputs, given `grads` of formula(*inputs); they are differentiable if grad mode is on."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: only the formula itself is differentiated here, not what computed its inputs.
        inputs = [t.view_as(t) if t is not None else None for t in inputs]
        paths = [
            (out, grad)
            for out, grad in zip(formula(*inputs), grads, strict=True)
            if out.requires_grad and grad is not None
        ]
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        leaf_grads: Iterator[Tensor | None] = iter([None] * len(leaves))
        if paths and leaves:
            outputs, output_grads = zip(*paths, strict=True)
            leaf_grads = iter(
                torch.autograd.grad(outputs, leaves, output_grads, create_graph=higher, allow_unused=True)
            )
    return [next(leaf_grads) if t is not None and t.requires_grad else None for t in inputs]
