"""The activations have the same names and order everywhere, because files and kernels store their positions."""

import re
from pathlib import Path

import pytest

from fastgen.ops import _tiers
from fastgen.ops._activations import ACTIVATIONS

ROOT = Path(__file__).parents[1]


def native() -> list[str]:
    """The enumerators of csrc/shared/activation.h."""
    text = (ROOT / "csrc/shared/activation.h").read_text()
    return re.findall(r"\w+", re.search(r"enum class Activation \{([^}]*)\}", text)[1])


def test_native_code_has_the_same_activations():
    assert native() == list(ACTIVATIONS)


def test_triton_has_the_same_activations():
    pytest.importorskip("triton", reason="triton is not installed")
    assert tuple(ACTIVATIONS) == _tiers.triton.kernels("_activations").ACTIVATIONS


@pytest.mark.parametrize("name", list(ACTIVATIONS)[1:])
@pytest.mark.parametrize(
    ("file", "functions"),
    (
        ("csrc/shared/activation.h", ("activate", "activate_grad")),
        ("kernels/_activations.py", ("activate", "activate_grad")),
        ("csrc/cuda/activation.cuh", ("with_activation",)),
    ),
)
def test_every_activation_has_a_branch(file, functions, name):
    """A name without a branch would silently be the identity."""
    text = (ROOT / file).read_text()
    for function in functions:
        body = re.split(rf"\b{function}\(", text, maxsplit=1)[1]
        body = re.split(r"\n\}|\n\n\n", body, maxsplit=1)[0]
        assert re.search(rf'Activation::{name}\b|"{name}"', body), f"{function} of {file} has no {name}"
