"""tune(model): measure which implementation is fastest here, for `auto` to take."""

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

ROUNDS = 11  # of which one candidate after the other takes its turn
LEAST_ROUNDS = 3  # where the time ends, and of what takes FAR times the fastest candidate's time
FAR = 2
NOISE = 0.03  # less than this faster is not faster
NEAR = 1.5  # Triton's other tiles are tried where it takes at most so many times the fastest candidate's time
SCRATCH = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes, more than the caches hold
Progress = Callable[[str], None]
_log = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Tuned:
    """A question, its candidates' medians in milliseconds, the one that auto takes now, and the one that the rules
    take."""

    question: str
    milliseconds: dict[str, float]
    chosen: str
    rule: str


@dataclass(frozen=True)
class TuningReport:
    """What was measured. str() of it is a table."""

    tuned: tuple[Tuned, ...]
    left_out: tuple[str, ...]  # questions that the time did not suffice for, or whose candidates failed
    files: tuple[Path, ...]  # where the choices are kept

    def __str__(self) -> str:
        if not self.tuned and not self.left_out:
            return "nothing to choose: the model asks for no convolution that several implementations can compute here"
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
    """Measures which implementation of each convolution of a model is the fastest on this machine, and keeps it.

    A fused copy of the model runs once on the example inputs, forward and, if `training`, backward. Each convolution
    and gradient that it comes to, of a shape, precision and layout, is then computed by each implementation that can,
    in turns, and the median decides: the choice of the rules stays unless another is 3 % faster, in its best round too.
    From then on `auto` takes the fastest in every process of this user on a chip of this kind; impl=, use_impl and
    FASTGEN_IMPL still go before. Measure under the settings of the later run (threads, TF32, cudnn.benchmark, autocast)
    and with nothing else on the machine.

    Args:
        model: any module, on the device it is to run on. It stays as it is.
        example_inputs: what it is called with; the batch is that of the later run.
        training: measure gradients too, and statistics of the batch.
        seconds: no measurement starts later. What is left out then keeps its rule.
        progress: is called with a line after each measurement.

    Raises TypeError if model is no nn.Module, UsageError for inputs without a tensor, a time that is not positive or an
    implementation that is asked for, and FastgenError if the choices cannot be written.
    """
    if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(example_inputs)):
        given = ", ".join(type(given).__name__ for given in example_inputs) or "nothing"
        raise UsageError(f"example_inputs must hold a tensor, got {given}: give what the model is called with")
    network = fuse(model).train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            inputs = _pytree.tree_map(lambda leaf: _leaf(leaf, training), example_inputs)
            outs = [t for t in _pytree.tree_leaves(network(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])

    return tune_call(run, seconds=seconds, progress=progress)


def _leaf(value: Any, training: bool) -> Any:
    """An input of its own, whose gradient is asked for: another network of the step may want it."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(training and value.is_floating_point()).clone()  # may be changed in place


def tune_call(
    call: Callable[[], object], *, seconds: float = 60.0, progress: Progress | None = None, folder: Path | None = None
) -> TuningReport:
    """The same for what call() computes. folder: where the chips' files are kept, the user's cache by default."""
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be positive and finite, not {seconds}")
    if (asked := requested_impl()) != "auto":
        raise UsageError(
            f"tune measures what auto may choose, and {asked!r} is asked for: end use_impl, unset FASTGEN_IMPL"
        )
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        with _policy.recorded() as by_rules:
            call()
        deadline = time.monotonic() + seconds  # from here on: what was to be compiled is
        found, left_out = _measured(by_rules, deadline, progress or (lambda line: None))
    by_chip: dict[str, dict] = defaultdict(dict)
    for question, row in found.items():
        by_chip[_choices.chip(question.device) or ""][row.question] = (row.chosen, row.milliseconds)
    files = tuple(_choices.save(name, chosen, folder) for name, chosen in by_chip.items())
    return TuningReport(tuple(found.values()), tuple(map(str, left_out)), files)


def _measured(
    by_rules: dict[Question, Choice], deadline: float, progress: Progress
) -> tuple[dict[Question, Tuned], list[Question]]:
    """Each question by its implementations, then those that Triton may win by its tiles; and what is left out."""
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
            except torch.OutOfMemoryError as error:  # of the operands: the others' may fit
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
    """The one of the least median, unless a usual one is as fast but for noise: the rule's, or Triton's with its own
    tile.

    On a busy machine medians say little: the least times must say the same.
    """
    best = min(times, key=lambda name: statistics.median(times[name]))
    for usual in (rule, "triton"):
        if usual in times and any(of(times[best]) > (1 - NOISE) * of(times[usual]) for of in (statistics.median, min)):
            return usual
    return best


def _times(question: Question, names: list[str], deadline: float) -> dict[str, list[float]]:
    """Each candidate's, which take turns; one that cannot run is missing."""
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
            except Exception as error:  # whatever a compiler or a driver raises for what does not fit this chip
                _log.warning("tune: %s cannot compute %s: %s", name, question, error)
        for i in range(ROUNDS):
            if i >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            for name, taken in times.items():
                if i < LEAST_ROUNDS or min(taken) < FAR * min(map(min, times.values())):
                    taken.append(milliseconds(calls[name], scratch))
    return times


def milliseconds(call: Callable[[], object], scratch: Tensor) -> float:
    """The time of one call, whose operands have left the caches as between the layers of a network."""
    scratch.zero_()
    if not scratch.is_cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(scratch.device)  # the call's, whichever GPU is the current one
    first.record(stream)  # behind the write, during which the call is prepared
    call()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last)
