"""Decides which implementation computes a convolution, its gradients, or a whole layer. No other module does.

In order of precedence: cases that PyTorch computes wrongly, measurements on this chip (`_choices`), the rules
(`_rules`). An implementation requested by `impl`, use_impl or FASTGEN_IMPL overrides all of them (`_dispatch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from fastgen.ops import _choices, _processor, _rules, _tiers
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import TensorSpec, specialize, static_sizes
from fastgen.ops._memo import dynamo_constant, memoize
from fastgen.ops._question import Choice, Question
from fastgen.ops._requested import requested_impl
from fastgen.ops._rules import Convolution, Rule
from fastgen.ops._settings import Setting

# The questions that a thread asks, each with the rules' choice.
_recorder: Setting[dict[Question, Choice] | None] = Setting("recorder", None)
MODULES = Choice("modules", "", "too small for a fused op to pay: PyTorch's modules run one by one")


def fastest_forward(geometry: Geometry, x: Sequence[int], weight: TensorSpec, batch_stats: bool = False) -> Choice:
    """Chooses for a convolution of an input of x's shape; batch_stats: statistics of the output are computed too."""
    return _fastest("forward", geometry, x, weight, batch_stats)


def fastest_input_grad(geometry: Geometry, x: Sequence[int], weight: TensorSpec) -> Choice:
    """Chooses for the gradient of x, which is the adjoint convolution of the output's gradient."""
    return _fastest("input_grad", geometry, x, weight, False)


def fastest_weight_grad(geometry: Geometry, x: Sequence[int], weight: TensorSpec, channels_last: bool) -> Choice:
    """Chooses for the gradient of the weight. channels_last: the layout of the side (input or output) with more
    channels."""
    return _fastest("weight_grad", geometry, x, weight, channels_last)


def _fastest(what: str, geometry: Geometry, x: Sequence[int], weight: TensorSpec, flag: bool) -> Choice:
    if torch.compiler.is_compiling():
        return _fastest_in_graph(what, geometry, x, weight, flag)
    if _recorder.used and (record := _recorder.get()) is not None:
        question = _question(what, geometry, x, weight, flag)
        record[question] = by_rules(question)
    return _fastest_eager(what, geometry, x, weight, flag)


@memoize
def _fastest_eager(what: str, geometry: Geometry, x: Sequence[int], weight: TensorSpec, flag: bool) -> Choice:
    return fastest(_question(what, geometry, x, weight, flag))


def _question(what: str, geometry: Geometry, x: Sequence[int], weight: TensorSpec, flag: bool) -> Question:
    kind = weight.dtype, str(weight.device), weight.channels_last
    return Question(what, geometry, tuple(x), tuple(weight.shape), *kind, flag)


def _fastest_in_graph(what: str, geometry: Geometry, x: Sequence[int], weight: TensorSpec, flag: bool) -> Choice:
    """The choice in a compiled graph, a constant of it. Whether PyTorch computes a case wrongly also depends on dynamic
    sizes: that adds a guard."""
    question, wrong = _question(what, geometry, x, weight, flag), False
    if weight.dtype == torch.bfloat16 and not torch.compiler.is_exporting():
        wrong = _rules.torch_is_wrong(_computed(question))
    sizes = static_sizes(x), tuple(map(specialize, weight.shape))
    return _constant(wrong, what, geometry.specialized().arguments(), *sizes, *question[4:])


@dynamo_constant
def _constant(wrong: bool, what: str, geometry: tuple, *rest) -> Choice:
    question = Question(what, Geometry.of(*geometry), *rest)
    return _choice(_rules.WRONG, question) if wrong else fastest(question)


def fastest(question: Question) -> Choice:
    """The choice for a question."""
    rule = _rule(question)
    measured = None if rule is _rules.WRONG else _choices.measured(question)
    return measured or _choice(rule, question)


def by_rules(question: Question) -> Choice:
    """The choice where nothing was measured."""
    return _choice(_rule(question), question)


def _rule(question: Question) -> Rule:
    rules = _rules.WEIGHT_GRAD if question.what == "weight_grad" else _rules.FORWARD
    return _rules.decide(rules, _computed(question))


def _choice(rule: Rule, question: Question) -> Choice:
    reason = f"{rule.reason} (rule {rule.name!r})"
    if not rule.fastgen:
        return Choice("torch", "", reason)
    tier = auto_tier("conv2d_norm_act", question.device, question.dtype)
    return Choice(tier, "", reason) if tier else Choice("torch", "", f"fastgen has no kernels for {question.device}")


def _computed(question: Question) -> Convolution:
    """The convolution that a question is about, as the rules see it: for an input's gradient, the adjoint."""
    geometry, x = question.geometry, question.input
    if question.what == "input_grad":
        plain, read = geometry.without_reflection(x)
        geometry, x = plain.adjoint(read, question.weight), geometry.sizes(x, question.weight)
    is_weight_grad = question.what == "weight_grad"
    return Convolution(
        _processor.here(),
        geometry,
        x,
        question.weight,
        question.dtype,
        question.device.partition(":")[0],
        question.flag if is_weight_grad else question.channels_last,
        question.what == "forward" and question.flag,
        is_weight_grad,
    )


@memoize
def torch_can_compute(geometry: Geometry, x: Sequence[int], weight: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernels compute a layer on the CPU right and without falling back to a loop: a small one is
    left to PyTorch's modules then, and MODULES is the choice."""
    processor = _processor.here()
    convolution = Convolution(processor, geometry, x, weight, dtype, "cpu", False)
    return processor.torch_multiplies(dtype) and not _rules.torch_is_wrong(convolution)


def runs_auto() -> bool:
    """Whether auto chooses, among the CPU's implementations: use_impl and the environment request none."""
    return requested_impl() == "auto" and not _tiers.ON_CPU


def auto_tier(op: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """The tier that auto prefers on a device: cpp on the CPU, the first GPU tier that can run on a GPU, else None."""
    if device.startswith("cuda") or (device == "cpu" and _tiers.ON_CPU):
        order = gpu_tiers(op, device)
        return next((tier for tier in order if _tiers.unavailable(tier, device, dtype) is None), order[0])
    return "cpp" if device == "cpu" else None


def gpu_tiers(op: str, device: str) -> tuple[str, ...]:
    """The GPU tiers in auto's order: first the one that was measured faster for an op and its gradient."""
    first = _choices.faster_tier(op.removesuffix("_backward").removesuffix("_group"), device)
    return tuple(sorted(_tiers.GPU_TIERS, key=lambda tier: tier != first))


@contextlib.contextmanager
def recorded() -> Iterator[dict[Question, Choice]]:
    """A context that records the questions that this thread asks, each with the rules' choice."""
    choices: dict[Question, Choice] = {}
    with _recorder.set_to(choices):
        yield choices
