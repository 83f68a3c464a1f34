"""Run by test_executed.py in addition to the ops' own tests: float32 in TF32, switched on as in torch."""

import pytest
import torch

from fastgen import ops
from tests.cases import SMALL, TESTED
from tests.support.tolerance import error

GEOMETRY = ("stride", "padding", "output_padding", "padding_mode", "groups", "dilation")


@pytest.mark.parametrize("case", [case for case in SMALL if case.op != "norm_act"], ids=lambda case: case.id)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
def test_tf32(case, channels_last):
    options = {name: value for name, value in case.options.items() if name in GEOMETRY}
    options |= {"norm": "none", "activation": "identity"}
    x, weight = (case.tensors(torch.float32, channels_last)[name] for name in ("x", "weight"))
    op = getattr(ops, case.op)
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # tests/conftest.py restores it
    actual = op(x, weight, **options, impl=TESTED)
    expected = op(x.double(), weight.double(), **options, impl="reference")
    assert 1e-6 < error(actual, expected) < 1e-3  # 2^-11 of each factor
