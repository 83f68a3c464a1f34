"""How far a result may lie from what it is compared with, and why.

The ops are held to the error of PyTorch's own ops against float64 (`OpCase.allowed`). What is compared with another
float32 result, not with a more exact one, has a tolerance by name from here, in units of roundoff; a tolerance of one
test alone is a constant of its file. Calls contain no other numbers than 0: tests/test_source.py holds them to it.
"""

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def units(dtype: torch.dtype, relative: float, absolute: float) -> dict[str, float]:
    """The rtol and atol of assert_close, allclose and opcheck, in units of roundoff; the absolute one of values near
    1."""
    return {"rtol": relative * UNIT_ROUNDOFF[dtype], "atol": absolute * UNIT_ROUNDOFF[dtype]}


def error(found: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
