"""Whether what stands for a module computes what it does: rounding is told from a fault, and a state that changes is
found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastgen.inference._call import Inputs
from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._record import tensors, unfused
from fastgen.inference._trace import clone, randomness

# Bits behind the point that a value keeps. In float32 those that Winograd's algorithm leaves right in one layer.
_BITS = {"fp32": 17, "tf32": 10, "fp16": 10, "bf16": 7}


def compare(
    call: Callable[..., Any], module: nn.Module, example: Inputs, precision: str, numbers: Sequence[int]
) -> float:
    """The relative L2 difference of call(*inputs) from module(*inputs) over the example and other images, in batches of
    these numbers.

    Raises UnsupportedError where it is more than rounding makes: four times the rounding of one value, which a network
    of a few layers reaches, or three times the difference that appears where the module itself runs in float32 with its
    weights, and what each function returns, rounded to the precision. The latter follows a model that makes rounding
    larger, rounds at least as often as a plan, and needs no kernels of that precision. Over 80 networks a plan's
    difference was 0.4 to 1.3 times that; three times, since of outputs of few numbers some are near 0 by chance.

    The module stays as it is: copies run, and meet the first batch once more at the end, when they have seen others.
    All begin with the same random numbers. What draws none where the module does has kept those of its making, and is
    refused.
    """
    batches = [tuple(_images(x, n) for x in example) for n in numbers]
    batches.append(batches[0])
    with torch.no_grad():
        reference = clone(module, share=False)
        with randomness() as drawn:
            expected = [_expected(reference, batch, len(example[0])) for batch in batches]
            draws = drawn()
        with randomness() as drawn:
            found = [tensors(call(*copies(batch))) for batch in batches]
            if draws and not drawn():
                raise UnsupportedError("it draws random numbers, also in evaluation mode")
        error = _error(found, expected)
        allowed = 4 * 2.0 ** -(_BITS[precision] + 1)
        if error > allowed:
            with randomness():
                rounded = _rounded(
                    module, batches[:1], _BITS[precision]
                )  # one batch shows its size, and this takes long
            allowed = max(allowed, 3 * _error(rounded, expected[:1]))
    if not error <= allowed:
        raise UnsupportedError(
            f"the output differs from the module's by {error:.1e} (relative L2), and rounding explains {allowed:.1e}"
        )
    return error


def _expected(module: nn.Module, batch: Inputs, n: int) -> Inputs:
    try:
        return tensors(module(*copies(batch)))
    except Exception as error:  # the model's own code may raise anything
        if len(batch[0]) == n:
            raise
        raise UnsupportedError(f"it takes {n} images, and not {len(batch[0])}: {first_line(error)}") from error


def copies(inputs: Inputs) -> Inputs:
    """For a module that writes into its input."""
    return tuple(x.clone() for x in inputs)


def _images(x: Tensor, n: int) -> Tensor:
    """n images: x at the end, where it fits, and before it others of x's values in another order, channel by
    channel."""
    images = x[(torch.arange(n, device=x.device) - n) % len(x)]
    if x.dim() < 2 or not x.is_floating_point():
        return images
    images = images.flatten(2).clone() if x.dim() > 2 else images[:, None]
    generator = torch.Generator("cpu").manual_seed(n)
    for i in range(n - len(x) if n >= len(x) else n):
        images[i] = images[i][:, torch.randperm(images.shape[2], generator=generator, device="cpu").to(x.device)]
    return images.view(n, *x.shape[1:])


def _error(found: list[Inputs], expected: list[Inputs]) -> float:
    """The relative L2 difference over all images, of the output where it is the largest. Accumulates in float64."""
    squares: dict[int, tuple[float, float]] = {}
    for outputs, wanted in zip(found, expected, strict=True):
        if len(outputs) != len(wanted):
            raise UnsupportedError(f"there are {len(outputs)} outputs where the module gives {len(wanted)}")
        for i, (ours, theirs) in enumerate(zip(outputs, wanted, strict=True)):
            if ours.shape != theirs.shape:
                given = f"{tuple(ours.shape)} where the module gives {tuple(theirs.shape)}"
                raise UnsupportedError(f"the output is {given}")
            finite = theirs.isfinite()
            if not torch.equal(ours.isfinite(), finite):
                raise UnsupportedError("the output has other non-finite entries than the module's")
            ours, theirs = ours[finite].double(), theirs[finite].double()
            difference, size = squares.get(i, (0.0, 0.0))
            squares[i] = difference + float((ours - theirs).square().sum()), size + float(theirs.square().sum())
    return max((difference / max(size, 1e-12)) ** 0.5 for difference, size in squares.values())


def _rounded(module: nn.Module, batches: list[Inputs], bits: int) -> list[Inputs]:
    """What the module computes where its weights and all values are rounded, in float32."""
    rounded = clone(module, share=False)
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            _round(parameter, bits)
    with unfused(rounded), _Rounding(bits):
        return [tensors(rounded(*copies(batch))) for batch in batches]  # clone() is a function that is rounded


class _Rounding(TorchFunctionMode):
    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # In place, so that views stay views. What is expanded was rounded before.
            if isinstance(value, Tensor) and value.dtype == torch.float32 and 0 not in value.stride():
                _round(value, self.bits)
        return result


def _round(x: Tensor, bits: int) -> None:
    """To the nearest number of so many bits behind the point, in place."""
    if bits == 7:  # faster
        x.detach().copy_(x.detach().to(torch.bfloat16))
        return
    drop = 23 - bits
    number = x.detach().view(torch.int32)
    nearest = (number + ((number >> drop) & 1) + ((1 << (drop - 1)) - 1)) >> drop << drop
    x.detach().copy_(torch.where(x.isfinite(), nearest.view(torch.float32), x))


def changes(module: nn.Module, inputs: Inputs) -> dict[nn.Module, str]:
    """The modules whose own state a second call on the same inputs changes, and the name of what changes first:
    parameters, buffers, and tensors, arrays and numbers in other attributes. What the first call fills, as a cache, is
    no change."""
    with torch.no_grad():
        module(*copies(inputs))
        before = {key: _copy(value) for key, value in _state(module)}
        module(*copies(inputs))
    after = dict(_state(module))
    found: dict[nn.Module, str] = {}
    names = {part: name for name, part in module.named_modules()}
    for key in (*before, *after):
        if key not in before or key not in after or not _are_equal(before[key], after[key]):
            part, attribute = key[0], key[1]
            found.setdefault(part, f"{names[part]}.{attribute}" if names[part] else attribute)
    return found


def _state(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str, int], Any]]:
    for part in module.modules():
        own = {name: value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")}
        own |= {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for name, value in own.items():
            for i, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, Tensor | np.ndarray | int | float | str):
                    yield (part, name, i), leaf


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))
