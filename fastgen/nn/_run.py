"""Runs PyTorch's layers as one op: translates the layers' attributes to the op's arguments and calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.nn._patterns import ACTIVATIONS, BATCH_NORMS, DIMENSIONS, INSTANCE_NORMS, kind, padding
from fastgen.nn.spectral_norm import undivided
from fastgen.ops import _policy, _rules, _spectral_convolution
from fastgen.ops._check import FLOATING
from fastgen.ops._dispatch import is_pytorchs
from fastgen.ops._epilogue import Epilogue
from fastgen.ops._geometry import Geometry
from fastgen.ops._info import count
from fastgen.ops._layout import TensorSpec, spec_of
from fastgen.ops._question import Choice
from fastgen.ops._settings import Setting


class Call(NamedTuple):
    """A recorded call of a run of layers that one op can compute, for `fastgen.explain`."""

    layers: tuple[nn.Module | None, nn.Module | None, nn.Module | None]  # convolution, norm, activation
    x: TensorSpec
    wants_input_grad: bool
    modules: Choice | None  # the reason if PyTorch's modules compute it, one by one


_recorder: Setting[list[Call] | None] = Setting("calls", None)
_NOT_A_BATCH = Choice("modules", "", "no op takes an input of this type, layout or number of dimensions")
_TORCH_ALONE = Choice("modules", "", "forward derivatives and ONNX support only PyTorch's ops")


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """A context that records the runs of layers that this thread calls."""
    calls: list[Call] = []
    with _recorder.set_to(calls):
        yield calls


def run(x: Tensor, convolution: Any, norm: nn.Module | None, activation: nn.Module | None) -> Tensor:
    """What calling the three modules in turn computes, by one op, unless the modules are faster or no op supports x."""
    modules = _left_to_modules(x, convolution, norm)
    if _recorder.used and (record := _recorder.get()) is not None:
        wants_grad = x.requires_grad and torch.is_grad_enabled()
        record.append(Call((convolution, norm, activation), spec_of(x), wants_grad, modules))
    if modules is not None:
        if modules is _policy.MODULES:
            count(geometry_of(convolution).fused()[0], modules.implementation)
        return _in_turn(x, convolution, norm, activation)
    try:
        y = _in_one(x, convolution, norm, activation)
    except UsageError:  # the environment names an unknown implementation or instruction set
        raise
    except (TypeError, ValueError):
        # An op's check refuses the input: the modules may accept it, or else raise PyTorch's own error.
        return _in_turn(x, convolution, norm, activation)
    if isinstance(norm, BATCH_NORMS) and _counts(norm):
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return y


def _left_to_modules(x: Tensor, convolution: Any, norm: nn.Module | None) -> Choice | None:
    """The reason why PyTorch's modules should compute a run one by one, or None."""
    if not _is_batch(x, convolution, norm):
        return _NOT_A_BATCH
    if is_pytorchs():
        return _TORCH_ALONE
    if convolution is not None and _synchronizes(norm) is None and _is_small(x, convolution):
        return _policy.MODULES
    return None


def _in_turn(x: Tensor, *modules: nn.Module | None) -> Tensor:
    for module in modules:
        x = x if module is None else kind(module).forward(module, x)
    return x


def _is_batch(x: Tensor, convolution: Any, norm: Any) -> bool:
    """Whether the ops support x: a batch with the number of dimensions and channels that the modules expect, and with a
    dtype and layout that the kernels support. Other inputs, such as a single image or integers, are left to the
    modules."""
    if not _is_dense(x):
        return False
    if convolution is not None:
        weight = convolution._parameters.get("weight")  # None where a parametrization computes it
        return x.dim() == 4 and x.shape[1] == convolution.in_channels and (weight is None or _is_dense(weight))
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    dimensions = DIMENSIONS.get(kind(norm))
    return (x.dim() > 1 if dimensions is None else x.dim() in dimensions) and x.shape[1] == channels


def _is_dense(x: Tensor) -> bool:
    is_known_type = type(x) is Tensor or type(x) is nn.Parameter or type(x).__module__.startswith("torch._subclasses.")
    return is_known_type and x.dtype in FLOATING and x.layout is torch.strided and not (x.is_nested or x.is_meta)


def _in_one(x: Tensor, convolution: nn.Module | None, norm: nn.Module | None, activation: nn.Module | None) -> Tensor:
    arguments: dict[str, Any] = {"activation": ACTIVATIONS[kind(activation)] if activation is not None else "identity"}
    if isinstance(activation, nn.LeakyReLU):
        arguments.update(negative_slope=activation.negative_slope, inplace=activation.inplace)
    arguments.update(_norm_arguments(norm))
    if convolution is None:
        return ops.norm_act(x, **arguments)
    assert isinstance(convolution, (nn.Conv2d, nn.ConvTranspose2d))
    for name in ("stride", "groups", "dilation"):
        arguments[name] = getattr(convolution, name)
    arguments["padding"] = padding(convolution)
    arguments["memory_efficient"] = getattr(convolution, "memory_efficient", False)
    y = None if arguments["memory_efficient"] or norm is not None else _run_over_sigma(x, convolution, arguments)
    if y is not None:
        return y
    if isinstance(convolution, nn.Conv2d):
        arguments["padding_mode"] = convolution.padding_mode
        return ops.conv2d_norm_act(x, convolution.weight, convolution.bias, **arguments)
    arguments["output_padding"] = convolution.output_padding
    return ops.conv_transpose2d_norm_act(x, convolution.weight, convolution.bias, **arguments)


def _run_over_sigma(x: Tensor, convolution: nn.Conv2d | nn.ConvTranspose2d, arguments: dict[str, Any]) -> Tensor | None:
    """Runs a convolution under spectral norm by a kernel that divides its sums by sigma; None if no kernel can."""
    found = undivided(convolution)
    if found is None:
        return None
    norm, weight = found
    geometry = geometry_of(convolution)
    epilogue = Epilogue(**{name: arguments[name] for name in Epilogue._fields if name in arguments})
    if not _spectral_convolution.can_compute(x, weight, geometry, epilogue):
        return None
    return _spectral_convolution.convolution(x, *norm.parts(weight), convolution.bias, geometry, epilogue)


def geometry_of(convolution: nn.Conv2d | nn.ConvTranspose2d) -> Geometry:
    output_padding = convolution.output_padding if isinstance(convolution, nn.ConvTranspose2d) else ()
    return Geometry.of(
        convolution.stride, padding(convolution), output_padding, convolution.groups, convolution.dilation,
        convolution.padding_mode == "reflect",
    )  # fmt: skip


def _is_small(x: Tensor, convolution: Any) -> bool:
    """Whether a convolution on the CPU takes less time than the overhead of calling a fused op.

    False if an implementation is requested, if memory has to be saved, and in compiled graphs.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not _policy.runs_auto():
        return False
    if getattr(convolution, "memory_efficient", False):
        return False
    n, _, height, width = x.shape
    pixels = n * height * width
    if kind(convolution) is nn.Conv2d:
        pixels //= convolution.stride[0] * convolution.stride[-1]  # it may have one element for both axes
    weights = convolution.in_channels * convolution.out_channels // convolution.groups
    multiplications = pixels * weights * convolution.kernel_size[0] * convolution.kernel_size[1]
    if not _rules.is_small(multiplications, torch.is_grad_enabled()):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.float32:  # the usual case, without the way to an answer that is known
        return True
    return _policy.torch_can_compute(geometry_of(convolution), x.shape, weight_shape(convolution), dtype)


def weight_shape(convolution: Any) -> tuple[int, ...]:
    """The shape of a convolution's weight, without accessing the weight, which may run a power iteration."""
    channels = convolution.in_channels, convolution.out_channels
    first, second = channels if isinstance(convolution, nn.ConvTranspose2d) else channels[::-1]
    return first, second // convolution.groups, *convolution.kernel_size


def _counts(norm: Any) -> bool:
    """Whether a batch norm counts this batch."""
    return norm.training and norm.track_running_stats and norm.num_batches_tracked is not None


def _norm_arguments(norm: nn.Module | None) -> dict[str, Any]:
    """The op's arguments for a norm layer. Does what the layer's forward does about cumulative averages and untracked
    statistics."""
    if norm is None:
        return {"norm": "none"}
    if isinstance(norm, nn.GroupNorm):
        affine = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        return {"norm": "group", "num_groups": norm.num_groups, "eps": norm.eps, **affine}
    assert isinstance(norm, (*BATCH_NORMS, *INSTANCE_NORMS))
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.track_running_stats
    if isinstance(norm, BATCH_NORMS) and norm.momentum is None and _counts(norm):
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)  # type: ignore[arg-type]  # a cumulative average
    use_running = tracks or not norm.training
    training = norm.training or (norm.running_mean is None if isinstance(norm, BATCH_NORMS) else not tracks)
    return {
        "norm": "batch" if isinstance(norm, BATCH_NORMS) else "instance",
        "running_mean": norm.running_mean if use_running else None,
        "running_var": norm.running_var if use_running else None,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "training": training,
        "momentum": momentum,
        "eps": norm.eps,
        "process_group": _synchronizes(norm),
    }


def _synchronizes(norm: nn.Module | None) -> Any:
    """The process group over which a SyncBatchNorm computes its statistics, or None."""
    if norm is None or kind(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
