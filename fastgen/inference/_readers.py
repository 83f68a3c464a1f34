"""Readers: one per PyTorch function that a plan can compute. A reader turns a call of the function into a node.

A reader has the same parameters as the function, so that Python binds the arguments. It returns (kind, inputs,
options). The kind is a class of steps, with the options as its fields, or a name for which _lower.py has a method.
Readers raise UnsupportedError for calls that no plan can compute.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.runtime._steps import Activation, AvgPool, MaxPool, Narrow, Norm, UpsampleBilinear, UpsampleNearest


class UnsupportedError(Exception):
    """The module computes something that a plan cannot."""


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


SAME = "same"


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]  # type: ignore[return-value]


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        raise UnsupportedError(f"conv2d with padding={padding!r}")
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return "conv", (input,), {"weight": weight, "bias": bias, **options}


def _conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return "conv_transpose", (input,), {"weight": weight, "bias": bias, **options}


def _linear(input, weight, bias=None):
    return "linear", (input,), {"weight": weight, "bias": bias}


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    moments = {"mean": None, "var": None} if training else {"mean": running_mean, "var": running_var}
    norm = Norm.batch if training else Norm.affine
    return "norm", (input,), {"norm": norm, **moments, "weight": weight, "bias": bias, "eps": eps}


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    moments = {"mean": None, "var": None} if use_input_stats else {"mean": running_mean, "var": running_var}
    norm = Norm.instance if use_input_stats else Norm.affine
    return "norm", (input,), {"norm": norm, **moments, "weight": weight, "bias": bias, "eps": eps}


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    options = {"num_groups": num_groups, "weight": weight, "bias": bias, "eps": eps}
    return "norm", (input,), {"norm": Norm.group, **options}


def _activations() -> dict[Any, Callable]:
    """The readers of all functions and methods that have the name of an activation, in place or not. An activation with
    parameters of its own needs a reader that looks at them."""

    def reader(activation: Activation) -> Callable:
        return lambda input, inplace=False: ("activation", (input,), {"activation": activation})

    plain = [each for each in Activation if each not in (Activation.identity, Activation.leaky_relu)]
    owners = [(owner, each) for owner in (F, torch, Tensor) for each in plain]
    names = [(owner, f"{each.name}{suffix}", each) for owner, each in owners for suffix in ("", "_")]
    return {getattr(owner, name): reader(each) for owner, name, each in names if hasattr(owner, name)}


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return "activation", (input,), {"activation": Activation.leaky_relu, "negative_slope": negative_slope}


def _embedding(input, weight, padding_idx=None, max_norm=None, *_, **__):
    if max_norm is not None:
        raise UnsupportedError("embedding with max_norm")
    return "embedding", (input,), {"weight": weight}


def _one_hot(tensor, num_classes=-1):
    if num_classes < 1:
        raise UnsupportedError("one_hot without num_classes")
    return "embedding", (tensor,), {"weight": torch.eye(num_classes, dtype=torch.float32, device="cpu")}


def _images(input, name: str) -> None:
    if input.dim() != 4:
        raise UnsupportedError(f"{name} of {input.dim()} dimensions")


def _interpolate(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    _images(input, "interpolate")
    if mode not in ("nearest", "nearest-exact", "bilinear") or antialias:
        raise UnsupportedError(f"interpolate with mode={mode!r}, antialias={antialias}")
    scales = () if scale_factor is None or recompute_scale_factor or align_corners else _floats(scale_factor)
    if any(pixels * scale % 1 for pixels, scale in zip(input.shape[2:], scales, strict=False)):
        raise UnsupportedError(f"interpolate of {tuple(input.shape[2:])} by {scale_factor}, to a fraction of a pixel")
    if mode == "bilinear":
        return UpsampleBilinear, (input,), {"align_corners": bool(align_corners)}
    return UpsampleNearest, (input,), {"exact": mode == "nearest-exact"}


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, tuple | list) else (float(value),) * 2


def _expand(input, *sizes, **__):
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    _images(input, "expand")
    if len(sizes) != 4 or sizes[0] not in (-1, input.shape[0]) or sizes[1] not in (-1, input.shape[1]):
        raise UnsupportedError(f"expand of {tuple(input.shape)} to {sizes}")
    return UpsampleNearest, (input,), {}


def _expand_as(input, other):
    return _expand(input, *other.shape)


def _repeat(input, *repeats):
    repeats = tuple(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else repeats
    _images(input, "repeat")
    if repeats[:2] != (1, 1) or any(n != 1 and k != 1 for n, k in zip(repeats[2:], input.shape[2:], strict=True)):
        raise UnsupportedError(f"repeat of {tuple(input.shape)} by {repeats}")
    return UpsampleNearest, (input,), {}


def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    _images(input, "avg_pool2d")
    if divisor_override is not None:
        raise UnsupportedError("avg_pool2d with divisor_override")
    options = {"kernel": _pair(kernel_size), "stride": _pair(stride or kernel_size), "padding": _pair(padding)}
    return AvgPool, (input,), {**options, "count_include_pad": count_include_pad}


def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    _images(input, "max_pool2d")
    if return_indices:
        raise UnsupportedError("max_pool2d with return_indices")
    options = {"kernel": _pair(kernel_size), "stride": _pair(stride or kernel_size), "padding": _pair(padding)}
    return MaxPool, (input,), {**options, "dilation": _pair(dilation)}


def _adaptive_pool(kind: type[AvgPool] | type[MaxPool]) -> Callable:
    def read(input, output_size, return_indices=False):
        _images(input, f"adaptive_{kind.kind}2d")
        sizes = [output_size] * 2 if output_size is None or isinstance(output_size, int) else output_size
        pairs = [(pixels, size or pixels) for pixels, size in zip(input.shape[2:], sizes, strict=True)]
        if return_indices or any(pixels % size for pixels, size in pairs):
            raise UnsupportedError(f"adaptive_{kind.kind}2d of {tuple(input.shape[2:])} to {output_size}")
        window = tuple(pixels // size for pixels, size in pairs)
        return kind, (input,), {"kernel": window, "stride": window}

    return read


def _pixel_shuffle(input, upscale_factor):
    _images(input, "pixel_shuffle")
    return "pixel_shuffle", (input,), {}


def _reduction(is_mean: bool) -> Callable:
    def read(input, dim=None, keepdim=False, dtype=None):
        dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
        reduced = tuple(sorted(d % input.dim() for d in dims))
        if not (reduced == (2, 3) and input.dim() == 4) and not (reduced == (1,) and (keepdim or input.dim() == 2)):
            raise UnsupportedError(f"a mean or sum of {input.dim()} dimensions over {dim}")
        return "reduction", (input,), {"over_pixels": reduced == (2, 3), "is_mean": is_mean}

    return read


def _split(input, split_size_or_sections=1, dim=0, *, chunks=1):
    if dim not in (1, 1 - input.dim()):
        raise UnsupportedError(f"a split along dimension {dim}")
    return Narrow, (input,), {"start": 0}


def _narrow(input, dim, start, length):
    kind, inputs, _ = _split(input, length, dim)
    return kind, inputs, {"start": start % input.shape[1]}


def _getitem(input, index):
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, slice | int | type(None) | type(...)) for part in parts):
        raise UnsupportedError("indexing by tensors")
    result = input[index]
    if result.numel() == input.numel():  # dimensions of one element were added or removed
        return "view", (input,), {}
    channels = parts[1] if len(parts) > 1 else None
    if not isinstance(channels, slice) or channels.step not in (None, 1) or input[:, channels].shape != result.shape:
        raise UnsupportedError("indexing of anything but consecutive channels")
    return Narrow, (input,), {"start": channels.indices(input.shape[1])[0]}


def _pad(input, pad, mode="constant", value=None):
    if not any(pad):
        return SAME, (input,), {}
    pad = list(pad) + [0, 0] * (2 - len(pad) // 2)
    symmetric = len(pad) == 4 and pad[0] == pad[1] >= 0 and pad[2] == pad[3] >= 0
    if mode not in ("constant", "reflect") or (mode == "constant" and value not in (None, 0, 0.0)) or not symmetric:
        raise UnsupportedError(f"pad with {tuple(pad)}, mode={mode!r}")
    return "pad", (input,), {"padding": (pad[2], pad[0]), "reflect": mode == "reflect"}


def _cat(tensors, dim=0):
    if dim not in (1, 1 - tensors[0].dim()):
        raise UnsupportedError(f"cat along dimension {dim}")
    return "cat", tuple(tensors), {}


def _dropout(input, p=0.5, training=True, inplace=False):
    if training:
        raise UnsupportedError("active dropout")
    return SAME, (input,), {}


def _same(input, *_, **__):
    return SAME, (input,), {}


def _view(input, *_, **__):
    return "view", (input,), {}


def _arithmetic(of_tensors: str, scale_of: Callable, shift_of: Callable) -> Callable:
    def read(a, b, alpha=1, **_):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() and alpha == 1:
            return of_tensors, (a, b), {}
        x, number = (b, a) if isinstance(b, Tensor) else (a, b)
        if not isinstance(number, int | float) or (number is a and not scale_of(1)):
            raise UnsupportedError("arithmetic between tensors")
        return "scale", (x,), {"scale": float(scale_of(number)), "shift": float(shift_of(number * alpha))}

    return read


def _one(_: float) -> float:
    return 1.0


def _sub(a, b, alpha=1):
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() and alpha == 1:
        return "sub", (a, b), {}
    if not isinstance(b, int | float):
        raise UnsupportedError("a difference of tensors")
    return "scale", (a,), {"scale": 1.0, "shift": -float(b) * alpha}


def _rsub(a, b, alpha=1):
    if not isinstance(b, int | float):
        raise UnsupportedError("a difference of tensors")
    return "scale", (a,), {"scale": -1.0 * alpha, "shift": float(b)}


def _addcmul(input, tensor1, tensor2, *, value=1):
    if value != 1 or not input.dim() == tensor1.dim() == tensor2.dim():
        raise UnsupportedError("addcmul with a value other than 1 or with different numbers of dimensions")
    return "addcmul", (input, tensor1, tensor2), {}


def _div(a, b, rounding_mode=None):
    if not isinstance(b, int | float) or rounding_mode:
        raise UnsupportedError("a quotient of tensors")
    return "scale", (a,), {"scale": 1.0 / b, "shift": 0.0}


def _neg(a):
    return "scale", (a,), {"scale": -1.0, "shift": 0.0}


_add = _arithmetic("add", _one, float)
_mul = _arithmetic("mul", float, lambda number: 0.0)
READERS: dict[Any, Callable] = {
    F.conv2d: _conv2d, torch.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d, F.linear: _linear,
    F.batch_norm: _batch_norm, F.instance_norm: _instance_norm, F.group_norm: _group_norm,
    **_activations(), F.leaky_relu: _leaky_relu, F.leaky_relu_: _leaky_relu,
    F.pad: _pad, torch.cat: _cat, F.dropout: _dropout, F.dropout2d: _dropout, F.alpha_dropout: _dropout,
    Tensor.contiguous: _same, Tensor.clone: _same, torch.clone: _same, Tensor.detach: _same,
    Tensor.to: _same, Tensor.float: _same,
    Tensor.type_as: _same,
    Tensor.view: _view, Tensor.reshape: _view, torch.reshape: _view, Tensor.flatten: _view, torch.flatten: _view,
    Tensor.squeeze: _view, torch.squeeze: _view, Tensor.unsqueeze: _view, torch.unsqueeze: _view,
    Tensor.unflatten: _view, torch.add: _add, Tensor.add: _add, Tensor.add_: _add, operator.add: _add,
    Tensor.__add__: _add, Tensor.__radd__: _add, Tensor.__iadd__: _add, torch.mul: _mul, Tensor.mul: _mul,
    Tensor.__mul__: _mul, Tensor.__rmul__: _mul, torch.sub: _sub, Tensor.sub: _sub, Tensor.__sub__: _sub,
    torch.div: _div, Tensor.div: _div, Tensor.__truediv__: _div, torch.neg: _neg, Tensor.neg: _neg,
    Tensor.__neg__: _neg, torch.rsub: _rsub, Tensor.__rsub__: _rsub, torch.addcmul: _addcmul, Tensor.addcmul: _addcmul,
    torch.multiply: _mul, Tensor.mul_: _mul, Tensor.__imul__: _mul, F.embedding: _embedding, F.one_hot: _one_hot,
    Tensor.long: _same, F.interpolate: _interpolate, Tensor.expand: _expand, Tensor.expand_as: _expand_as,
    Tensor.repeat: _repeat, F.avg_pool2d: _avg_pool2d, F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d,
    F.adaptive_avg_pool2d: _adaptive_pool(AvgPool), F.adaptive_max_pool2d: _adaptive_pool(MaxPool),
    F.pixel_shuffle: _pixel_shuffle, torch.mean: _reduction(True), Tensor.mean: _reduction(True),
    torch.sum: _reduction(False), Tensor.sum: _reduction(False), torch.chunk: _split, Tensor.chunk: _split,
    torch.split: _split, Tensor.split: _split, torch.narrow: _narrow, Tensor.narrow: _narrow,
    Tensor.__getitem__: _getitem,
}  # fmt: skip
ARITHMETIC = {_add, _mul, _sub, _div, _rsub}
