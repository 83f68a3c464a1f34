"""The single launch of a power iteration: programs wait only for programs with earlier tickets, and for all whose
results they read."""

import os
import re
import threading

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastgen.ops import _tiers

kernels = _tiers.triton.kernels
_spectral, _plan = kernels("spectral_norm"), kernels("_spectral_plan")
SHAPES = ((96, 40, 3, 3), (1, 1), (700, 3), (5, 3000))


@pytest.mark.parametrize("v_first", (False, True))
def test_programs_wait_for_as_many_as_arrive(v_first):
    """The table's counts equal the numbers of a weight's programs, which are in the order of the steps."""
    matrices = tuple(_plan.matrix(torch.empty(shape), 0) for shape in SHAPES)
    plan = _plan.Plan.of(matrices, v_first, torch.device("cpu"))
    fields = plan.table.view(len(SHAPES), _plan.FIELDS.value).tolist()
    for i, (rows, _, columns, *_, first_line, lines, first_sum, sums, _) in enumerate(fields):
        t_size, s_size = (columns, rows) if v_first else (rows, columns)
        assert plan.lines[first_line : first_line + lines].tolist() == [[i, k] for k in range(lines)]
        assert plan.sums[first_sum : first_sum + sums].tolist() == [[i, k] for k in range(sums)]
        assert lines * _plan.ROWS >= t_size and sums * _plan.WIDTH >= s_size


def test_plans_are_outside_of_a_graphs_memory(monkeypatch):
    """A graph's memory belongs to the recording thread. The plan of a graph is kept while others are created."""
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **o: made.append(threading.get_ident()) or tensor(*a, **o))
    plans = [_plan.Plan.of(((k, 1, 1, 1),), False, torch.device("cpu")) for k in range(1, 300)]
    assert len(made) == 5 * len(plans) and threading.get_ident() not in made
    assert _plan.Plan.of(((1, 1, 1, 1),), False, torch.device("cpu")) is plans[0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.parametrize("capability", (80, 90, 100))
def test_the_counters_order_memory(capability):
    """A counter is raised after the stores before it and read before the loads after it, for the whole GPU."""
    from tests.kernels.compiled import compiled
    from tests.kernels.test_compiled import OTHERS

    launch, *_ = OTHERS["spectral_norm"]()
    ptx = compiled(launch, capability).ptx
    assert len(re.findall(r"\b(?:ld|atom)\.\S*acquire\S* ", ptx)) == 2
    assert len(re.findall(r"\b(?:red|atom)\.\S*release\S* ", ptx)) == 2
    assert "ld.global.cg" in ptx


@pytest.mark.parametrize("iterations", (0, 1, 3))
def test_one_launch_per_iteration(iterations):
    weights = [torch.empty(shape, device="meta") for shape in SHAPES]
    us = [torch.empty(w.shape[0], device="meta") for w in weights]
    vs = [torch.empty(w[0].numel(), device="meta") for w in weights]
    with kernels("_launch").recorded() as launches:
        _spectral.forward(weights, us, vs, [0] * len(weights), iterations, 1e-12, False, True)
    assert [kernel.__name__ for kernel, *_ in launches] == ["iterate"] * max(1, iterations)
