"""How far a result may be from the expected one, and why.

The ops are held to the error of PyTorch's own ops against float64 (`OpCase.allowed` in tests/cases.py). Where two
results of the same precision are compared instead, the tolerance has a name, here or in the file of the only test that
uses it, and is in units of roundoff. tests/test_source.py finds numbers in calls.
"""

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def units(dtype: torch.dtype, relative: float, absolute: float) -> dict[str, float]:
    """The rtol and atol of assert_close, in units of roundoff of the values and of 1."""
    return {"rtol": relative * UNIT_ROUNDOFF[dtype], "atol": absolute * UNIT_ROUNDOFF[dtype]}


def error(found: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


# Networks and their gradients: each layer sums thousands of products in a different order, and the errors add up.
FLOAT32 = units(torch.float32, 1024, 128)
# The same formulas in float64, up to third derivatives: some digits cancel, and a wrong term would be far larger.
FLOAT64 = units(torch.float64, 2**22, 2**22)
# Intermediate results that one implementation rounds to bfloat16 and the other keeps in float32: a few roundings.
BFLOAT16 = units(torch.bfloat16, 4, 2)
# opcheck: a graph calls the same kernels as eager mode, in the same order.
OPCHECK = {"rtol": 0, "atol": 0}
