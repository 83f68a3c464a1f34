"""tune(model): measures which implementations are the fastest on this machine, so that `auto` chooses them."""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fastgen.errors import UsageError
from fastgen.inference._fuse import fuse
from fastgen.ops import _candidates, _choices, _policy
from fastgen.ops._question import Choice, Question
from fastgen.ops._requested import requested_impl

ROUNDS = 11  # in each, every candidate is timed once
LEAST_ROUNDS = 3  # if time runs out, and for candidates that take FAR times as long as the fastest
FAR = 2
NOISE = 0.03  # smaller relative differences do not count
NEAR = 1.5  # Triton's other tiles are tried if Triton takes at most this many times as long as the fastest candidate
SCRATCH = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes, more than the caches hold
Progress = Callable[[str], None]
_log = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Tuned:
    """A question, its candidates' medians in milliseconds, the candidate that auto chooses from now on, and the one
    that the rules choose."""

    question: str
    milliseconds: dict[str, float]
    chosen: str
    rule: str


@dataclass(frozen=True)
class TuningReport:
    """The measurements of `tune`. str() of it is a table."""

    tuned: tuple[Tuned, ...]
    left_out: tuple[str, ...]  # questions for which time ran out or whose candidates failed
    files: tuple[Path, ...]  # the files with the choices

    def __str__(self) -> str:
        if not self.tuned and not self.left_out:
            return "nothing to choose: no convolution of the model has several implementations on this machine"
        rows = [("question", "milliseconds", "chosen", "by rule")] if self.tuned else []
        for row in self.tuned:
            times = ", ".join(f"{name} {ms:.3g}" for name, ms in row.milliseconds.items())
            rows.append((row.question, times, row.chosen, "the same" if row.chosen == row.rule else row.rule))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"not measured: {question}" for question in self.left_out]
        return "\n".join(lines + [f"kept in {file}" for file in self.files])


def tune(
    model: nn.Module,
    *example_inputs: Any,
    training: bool = True,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> TuningReport:
    """Measures which implementation of each convolution of a model is the fastest on this machine, and stores the
    result.

    A fused copy of the model runs once on the example inputs, forward and, if `training`, backward. Every distinct
    convolution and gradient of that run (by shape, precision and layout) is then timed with each implementation that
    can compute it, in turns. The rules' choice stays unless another implementation is 3 % faster in both the median and
    the best round. From then on `auto` uses the fastest in every process of this user on a chip of this kind; impl=,
    use_impl and FASTGEN_IMPL still take precedence. Measure under the settings of the later run (threads, TF32,
    cudnn.benchmark, autocast) and with nothing else running on the machine.

    Args:
        model: any module, on the device that it will run on. It is not changed.
        example_inputs: the inputs that it is called with, with the batch size of the later run.
        training: measure gradients and batch statistics too.
        seconds: no measurement starts later. Convolutions that are not measured in time keep the rules' choice.
        progress: is called with a line of text after each measurement.

    Raises TypeError if model is not an nn.Module; UsageError for inputs without a tensor, a time that is not positive,
    or while an implementation is requested; FastgenError if the choices cannot be written.
    """
    if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(example_inputs)):
        types = ", ".join(type(value).__name__ for value in example_inputs) or "nothing"
        raise UsageError(f"example_inputs must contain a tensor, got {types}: pass the arguments of the model's call")
    network = fuse(model).train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            inputs = _pytree.tree_map(lambda leaf: _leaf(leaf, training), example_inputs)
            outs = [t for t in _pytree.tree_leaves(network(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])

    return tune_call(run, seconds=seconds, progress=progress)


def _leaf(value: Any, training: bool) -> Any:
    """A copy of the input that requires a gradient: another network of the training step may need it."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(training and value.is_floating_point()).clone()  # may be changed in place


def tune_call(
    call: Callable[[], object], *, seconds: float = 60.0, progress: Progress | None = None, folder: Path | None = None
) -> TuningReport:
    """tune() for the convolutions that call() runs. folder: where the chips' files are; by default the user's cache."""
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be positive and finite, not {seconds}")
    if (requested := requested_impl()) != "auto":
        raise UsageError(
            f"tune measures auto's candidates, but {requested!r} is requested: leave use_impl or unset FASTGEN_IMPL"
        )
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        with _policy.recorded() as by_rules:
            call()
        deadline = time.monotonic() + seconds  # from now on, since call() has compiled the kernels
        found, left_out = _measured(by_rules, deadline, progress or (lambda line: None))
    by_chip: dict[str, dict] = defaultdict(dict)
    for question, row in found.items():
        by_chip[_choices.chip(question.device) or ""][row.question] = (row.chosen, row.milliseconds)
    files = tuple(_choices.save(name, chosen, folder) for name, chosen in by_chip.items())
    return TuningReport(tuple(found.values()), tuple(map(str, left_out)), files)


def _measured(
    by_rules: dict[Question, Choice], deadline: float, progress: Progress
) -> tuple[dict[Question, Tuned], list[Question]]:
    """Measures each question's implementations, then Triton's tiles where Triton may be the fastest. Returns the rows,
    and the questions that were left out."""
    names = {q: _candidates.names(q) for q in by_rules if _choices.chip(q.device)}
    names = {question: able for question, able in names.items() if len(able) > 1}
    found: dict[Question, Tuned] = {}
    for tiled in (False, True):
        for i, (question, able) in enumerate(names.items(), 1):
            if tiled:
                before = found[question].milliseconds if question in found else {}
                if before.get("triton", float("inf")) > NEAR * min(before.values(), default=0.0):
                    continue
            if time.monotonic() > deadline:
                break
            try:
                times = _times(question, [*able, *_candidates.tiles(question)] if tiled else able, deadline)
            except torch.OutOfMemoryError as error:  # the operands of other questions may still fit
                _log.warning("tune: no memory for %s: %s", question, str(error).partition("\n")[0])
                continue
            if len(times) < 2:
                continue
            rule = by_rules[question].implementation
            rule = rule if rule in times else "torch"
            medians = {name: statistics.median(taken) for name, taken in times.items()}
            row = found[question] = Tuned(str(question), medians, fastest(times, rule), rule)
            shown = ", ".join(f"{name} {ms:.3g} ms" for name, ms in medians.items())
            progress(f"{i} of {len(names)}: {row.question}: {shown}: {row.chosen}")
    return found, [question for question in names if question not in found]


def fastest(times: dict[str, list[float]], rule: str) -> str:
    """The candidate with the smallest median, unless a default one (the rules' choice, or Triton with its own tile) is
    as fast up to noise.

    On a busy machine medians are unreliable, so the minimum times must agree.
    """
    best = min(times, key=lambda name: statistics.median(times[name]))
    for usual in (rule, "triton"):
        if usual in times and any(of(times[best]) > (1 - NOISE) * of(times[usual]) for of in (statistics.median, min)):
            return usual
    return best


def _times(question: Question, names: list[str], deadline: float) -> dict[str, list[float]]:
    """The times of each candidate, measured in turns; candidates that cannot run are missing."""
    device = torch.device(question.device)
    scratch = torch.empty(SCRATCH[device.type], dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        calls = _candidates.calls(question, names)
        for name, call in calls.items():
            try:
                for _ in range(2):
                    call()
                times[name] = []
            except Exception as error:  # compilers and drivers raise anything for kernels that do not suit this chip
                _log.warning("tune: %s cannot compute %s: %s", name, question, error)
        for i in range(ROUNDS):
            if i >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            for name, taken in times.items():
                if i < LEAST_ROUNDS or min(taken) < FAR * min(map(min, times.values())):
                    taken.append(milliseconds(calls[name], scratch))
    return times


def milliseconds(call: Callable[[], object], scratch: Tensor) -> float:
    """The time of one call with cold caches, as between the layers of a network."""
    scratch.zero_()
    if not scratch.is_cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(scratch.device)  # the call's, whichever GPU is the current one
    first.record(stream)  # after the write to scratch, during which the CPU prepares the call
    call()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last)
