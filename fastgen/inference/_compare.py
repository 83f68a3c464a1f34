"""Checks that a plan or graphs compute what the module does, up to rounding, and finds state that changes from call to
call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._record import tensors, unfused
from fastgen.inference._sandbox import Inputs, clone, copy_inputs, preserved_rng

# Correct bits of a value's mantissa. For float32: the bits that are still correct after one layer by Winograd's
# algorithm.
_MANTISSA_BITS = {"fp32": 17, "tf32": 10, "fp16": 10, "bf16": 7}


def compare(
    call: Callable[..., Any], module: nn.Module, example: Inputs, precision: str, batch_sizes: Sequence[int]
) -> float:
    """The relative L2 difference between call(*inputs) and module(*inputs), for the example and for other images in
    batches of these sizes.

    Raises UnsupportedError if rounding does not explain the difference. The allowed difference is the larger of two
    bounds: four times the rounding of one value, which a network of a few layers reaches, and three times the
    difference that appears when the module itself runs in float32 with its weights and the result of each function
    rounded to the precision. The second bound covers models that amplify rounding. It needs no kernels of that
    precision, and rounds at least as often as a plan does. Over 80 networks a plan's difference was 0.4 to 1.3 times
    the rounded module's; the factor is three because in small outputs some numbers may be near 0 by chance.

    The module is not changed: copies run. The first batch is repeated at the end, to find state that the other batches
    left behind. All runs begin with the same random state. If the module draws random numbers and the call does not,
    the call has frozen the numbers that were drawn when it was made, and is refused.
    """
    batches = [tuple(images_like(x, n) for x in example) for n in batch_sizes]
    batches.append(batches[0])
    with torch.no_grad():
        reference = clone(module)
        with preserved_rng() as was_used:
            expected = [_expected(reference, batch, len(example[0])) for batch in batches]
            module_draws = was_used()
        with preserved_rng() as was_used:
            actual = [tensors(call(*copy_inputs(batch))) for batch in batches]
            if module_draws and not was_used():
                raise UnsupportedError("it draws random numbers, also in evaluation mode")
        error = relative_error(actual, expected)
        allowed = 4 * 2.0 ** -(_MANTISSA_BITS[precision] + 1)
        if error > allowed:
            with preserved_rng():
                # One batch is enough to estimate the difference, and this run is slow.
                rounded = _rounded_outputs(module, batches[:1], _MANTISSA_BITS[precision])
            allowed = max(allowed, 3 * relative_error(rounded, expected[:1]))
    if not error <= allowed:
        raise UnsupportedError(
            f"the output differs from the module's by {error:.1e} (relative L2), but rounding explains only "
            f"{allowed:.1e}"
        )
    return error


def _expected(module: nn.Module, batch: Inputs, n: int) -> Inputs:
    try:
        return tensors(module(*copy_inputs(batch)))
    except Exception as error:  # the model's own code may raise anything
        if len(batch[0]) == n:
            raise
        raise UnsupportedError(f"it takes {n} images, but not {len(batch[0])}: {first_line(error)}") from error


def images_like(x: Tensor, n: int) -> Tensor:
    """A batch of n images that ends with x, if x fits; the other images are images of x with the values of each channel
    permuted."""
    images = x[(torch.arange(n, device=x.device) - n) % len(x)]
    if x.dim() < 2 or not x.is_floating_point():
        return images
    images = images.flatten(2).clone() if x.dim() > 2 else images[:, None]
    generator = torch.Generator("cpu").manual_seed(n)
    for i in range(n - len(x) if n >= len(x) else n):
        images[i] = images[i][:, torch.randperm(images.shape[2], generator=generator, device="cpu").to(x.device)]
    return images.view(n, *x.shape[1:])


def relative_error(actual: list[Inputs], expected: list[Inputs]) -> float:
    """The relative L2 difference over all batches, for the output that differs most. Accumulates in float64."""
    squares: dict[int, tuple[float, float]] = {}
    for outputs, expected_outputs in zip(actual, expected, strict=True):
        if len(outputs) != len(expected_outputs):
            raise UnsupportedError(f"there are {len(outputs)} outputs, but the module has {len(expected_outputs)}")
        for i, (y, exact) in enumerate(zip(outputs, expected_outputs, strict=True)):
            if y.shape != exact.shape:
                shapes = f"{tuple(y.shape)}, but the module's is {tuple(exact.shape)}"
                raise UnsupportedError(f"the output is {shapes}")
            finite = exact.isfinite()
            if not torch.equal(y.isfinite(), finite):
                raise UnsupportedError("the output has non-finite values at other positions than the module's")
            y, exact = y[finite].double(), exact[finite].double()
            difference, norm = squares.get(i, (0.0, 0.0))
            squares[i] = difference + float((y - exact).square().sum()), norm + float(exact.square().sum())
    return max((difference / max(norm, 1e-12)) ** 0.5 for difference, norm in squares.values())


def _rounded_outputs(module: nn.Module, batches: list[Inputs], bits: int) -> list[Inputs]:
    """What the module computes in float32 if its weights and all values are rounded."""
    rounded = clone(module)
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            _round(parameter, bits)
    with unfused(rounded), _Rounding(bits):
        return [tensors(rounded(*copy_inputs(batch))) for batch in batches]  # clone() rounds the inputs too


class _Rounding(TorchFunctionMode):
    """Rounds the result of every function."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # In place, so that views stay views. An expanded tensor was rounded before.
            if isinstance(value, Tensor) and value.dtype == torch.float32 and 0 not in value.stride():
                _round(value, self.bits)
        return result


def _round(x: Tensor, bits: int) -> None:
    """Rounds in place to the nearest numbers with this many mantissa bits, ties to even."""
    if bits == 7:  # faster
        x.detach().copy_(x.detach().to(torch.bfloat16))
        return
    drop = 23 - bits
    number = x.detach().view(torch.int32)
    nearest = (number + ((number >> drop) & 1) + ((1 << (drop - 1)) - 1)) >> drop << drop
    x.detach().copy_(torch.where(x.isfinite(), nearest.view(torch.float32), x))


def changes(module: nn.Module, inputs: Inputs) -> dict[nn.Module, str]:
    """The modules whose own state a second call on the same inputs changes, each with the name of the first thing that
    changes: a parameter or buffer, or a tensor, array or number in another attribute. Attributes that the first call
    fills, such as a cache, do not count."""
    with torch.no_grad():
        module(*copy_inputs(inputs))
        before = {key: _copy(value) for key, value in _state(module)}
        module(*copy_inputs(inputs))
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
        attributes = {
            name: value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")
        }
        attributes |= {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for name, value in attributes.items():
            for i, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, Tensor | np.ndarray | int | float | str):
                    yield (part, name, i), leaf


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _are_equal(a: Any, b: Any) -> bool:
    """Equality in which NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))
