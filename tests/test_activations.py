"""The activations have the same names everywhere and, where their positions are codes, the same order."""

import re
from pathlib import Path

import pytest

from fastgen.ops import norm_act
from fastgen.ops._activations import ACTIVATIONS
from fastgen.runtime import _steps as steps
from tests.cases import SMALL

ROOT = Path(__file__).parents[1]


def native() -> list[str]:
    """The enumerators of csrc/shared/activation.h."""
    text = (ROOT / "csrc/shared/activation.h").read_text()
    return ["identity", *re.findall(r"X\((\w+)\)", re.search(r"FASTGEN_ACTIVATIONS\(X\) ((?:.*\\\n)*.*)", text)[1])]


def test_native_code_and_plans_have_the_same_activations():
    assert native() == [each.name for each in steps.Activation] == list(ACTIVATIONS)


def test_every_activation_has_a_case():
    assert {case.options.get("activation") for case in SMALL} >= set(ACTIVATIONS)


def test_documents_name_every_activation():
    names = list(ACTIVATIONS)
    assert ", ".join(f"`{name}`" for name in names) in (ROOT / "docs/ops.md").read_text()
    codes = ", ".join(f"{code} {name}" for code, name in enumerate(names))
    assert f"| activation | {codes} |" in (ROOT / "docs/plan-format.md").read_text()
    assert set(re.findall(r'"(\w+)"', re.search(r"activation: ([^:]*)", norm_act.__doc__)[1])) == set(names)


@pytest.mark.parametrize("name", list(ACTIVATIONS)[1:])
@pytest.mark.parametrize(
    ("file", "functions"),
    (
        ("csrc/shared/activation.h", ("activate", "activate_grad")),
        ("kernels/_activations.py", ("activate", "activate_grad")),
    ),
)
def test_every_activation_has_a_branch(file, functions, name):
    """A name without a branch would silently be the identity."""
    text = (ROOT / file).read_text()
    for function in functions:
        body = re.split(rf"\b{function}\(", text, maxsplit=1)[1]
        body = re.split(r"\n\}|\n\n\n", body, maxsplit=1)[0]
        assert re.search(rf'Activation::{name}\b|"{name}"', body), f"{function} of {file} has no {name}"
