"""Shared by the tests of measured choices: two convolutions for which the rules choose differently."""

from dataclasses import replace

import torch

from fastgen import ops
from fastgen.ops import _choices, _policy
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import spec_of
from fastgen.ops._question import Question
from tests.cases import SMALL
from tests.support.observe import observe

BY_NAME = {case.id: case for case in SMALL}
# By the rules fastgen computes the forward pass of the first, PyTorch that of the second.
FASTGENS = replace(
    BY_NAME["conv_transpose2d_norm_act-dcgan-middle"], shapes={"x": (2, 16, 8, 8), "weight": (16, 16, 4, 4)}
)
TORCHS = BY_NAME["conv2d_norm_act-eval"]
X = torch.zeros(2, 16, 8, 8)
WEIGHT = torch.zeros(16, 16, 4, 4)
GEOMETRY = Geometry((2, 2), (1, 1), (0, 0), 1, (1, 1))


def run(case, impl="auto"):
    """The results of a training step on a case, and the implementations that ran."""
    tensors, upstream = case.tensors(torch.float32), torch.ones(case._output_shape())
    before = ops.implementations_used().get(case.op, {})
    seen = observe(case, tensors, upstream, impl)
    after = ops.implementations_used()[case.op]
    return seen, {name for name, count in after.items() if count > before.get(name, 0)}


def recorded_choices(case) -> dict:
    with _policy.recorded() as questions:
        run(case)
    return {question: choice for question, choice in questions.items() if question.device == "cpu"}


def keep(questions, implementation, folder=None):
    return _choices.save(
        _choices.chip("cpu"), {str(q): (implementation, {implementation: 1.0}) for q in questions}, folder
    )


def forward() -> str:
    return str(_policy.fastest_forward(GEOMETRY, X.shape, spec_of(WEIGHT)))


def key(what="forward") -> str:
    return str(Question(what, GEOMETRY, tuple(X.shape), tuple(WEIGHT.shape), torch.float32, "cpu", False, False))
