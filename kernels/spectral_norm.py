"""weight / sigma for many weights: one launch for a power iteration, however many weights there are.

A weight is a matrix W with rows along its `dim` and columns along the rest. One pass over W computes t = W v, the line
product, for some of its lines (the rows) and, while they are in the cache, their part of s = W^T t, the summed product;
the parts are added afterwards. With u = t / |t|, v = s / |s| and W^T u = s / |t|, sigma = u^T W v = (s / |t|) . v needs
no further pass; a last pass writes them and weight / sigma. With v_first the lines are the columns, and u and v change
roles.

All three steps are one launch. Each program draws a ticket; earlier steps have lower tickets. The program then waits
for those programs of its weight whose results it reads. They drew their tickets earlier, so they are running or have
ended, in whatever order the GPU starts programs: there is no deadlock.

Sums are float32, in a fixed order. A table on the device, created once per set of shapes, maps each ticket to a part of
a weight; the tensors' addresses are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import launch, wide
from fastgen.kernels._layout import in_order, is_channels_last
from fastgen.kernels._spectral_plan import CHUNK, COLUMNS, FIELDS, PARTS, ROWS, WIDTH, Plan, matrix
from torch import Tensor

MAX_WEIGHTS = 32  # per launch


@triton.jit
def pick(pointers, index, COUNT: tl.constexpr):
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        if index == i:
            chosen = pointers[i]
    return chosen


@triton.jit
def field(table, weight, FIELD: tl.constexpr):
    return tl.load(table + weight * FIELDS + FIELD)


@triton.jit
def part_of(table, blocks, ticket, WIDE: tl.constexpr):
    """The ticket's weight, its index among the tickets of that weight, and rows, inner, columns and spread of the
    matrix.

    Element (r, m) is at m / inner * rows * inner + r * inner + m % inner, where m counts columns in memory order: m is
    column m % spread * (columns / spread) + m / spread of the matrix. WIDE: they have 64 bits, and so does everything
    computed from them.
    """
    at = blocks + 2 * ticket
    weight, number = tl.load(at), tl.load(at + 1)
    rows, inner, columns = field(table, weight, 0), field(table, weight, 1), field(table, weight, 2)
    if WIDE:
        number, rows, inner, columns = number.to(tl.int64), rows.to(tl.int64), inner.to(tl.int64), columns.to(tl.int64)
    return weight, number, rows, inner, columns, field(table, weight, 3)


@triton.jit
def arrive(counter):
    tl.debug_barrier()  # after the stores of all threads
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, count):
    """Waits until `count` programs have arrived. Read their results with load_shared."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass


@triton.jit
def load_shared(pointer, mask, other):
    """Loads what another program stored, bypassing the multiprocessor's L1 cache."""
    return tl.load(pointer, mask, other, cache_modifier=".cg")


@triton.jit
def products(
    weights, vectors, others, table, blocks, ticket, t, parts, norms, COUNT: tl.constexpr, TRANSPOSED: tl.constexpr,
    ITERATE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """t = W vector for some lines (rows, or columns if TRANSPOSED). ITERATE: also their part of W^T t, and |t|^2; else
    other . t. Returns the weight."""
    index, number, rows, inner, columns, spread = part_of(table, blocks, ticket, WIDE)
    lines = columns if TRANSPOSED else rows
    length = rows if TRANSPOSED else columns
    line = number * ROWS + tl.arange(0, ROWS)
    valid = line < lines
    weight = pick(weights, index, COUNT)
    vector = pick(vectors, index, COUNT)
    base = line // inner * rows * inner + line % inner if TRANSPOSED else line * inner
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, length, COLUMNS):
        m = first + tl.arange(0, COLUMNS)
        inside = m < length
        if TRANSPOSED:
            step = m * inner
            position = m
        else:
            step = m // inner * rows * inner + m % inner
            position = m % spread * (columns // spread) + m // spread
        w = tl.load(weight + base[:, None] + step[None, :], valid[:, None] & inside[None, :], 0.0).to(tl.float32)
        total += w * tl.load(vector + position, inside, 0.0)[None, :]
    product = tl.sum(total, 1)
    if ITERATE:
        tl.store(t + field(table, index, 4) + line, product, valid)
        tl.store(norms + ticket, tl.sum(product * product, 0))
        to = parts + field(table, index, 5) + number * length
        for first in range(0, length, COLUMNS):
            m = first + tl.arange(0, COLUMNS)
            inside = m < length
            step = m * inner if TRANSPOSED else m // inner * rows * inner + m % inner
            w = tl.load(weight + base[:, None] + step[None, :], valid[:, None] & inside[None, :], 0.0).to(tl.float32)
            tl.store(to + m, tl.sum(w * product[:, None], 0), inside)
    else:
        position = line % spread * (columns // spread) + line // spread if TRANSPOSED else line
        other = tl.load(pick(others, index, COUNT) + position, valid, 0.0)
        tl.store(norms + ticket, tl.sum(product * other, 0))
    return index


@triton.jit
def add_parts(
    table, blocks, ticket, arrived, parts, s, norms, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Some elements of s = W^T t, and their part of |s|^2. Returns the weight."""
    index, number, rows, _, columns, _ = part_of(table, blocks, ticket, WIDE)
    length = rows if TRANSPOSED else columns
    count = field(table, index, 8)
    wait(arrived + index, count)
    m = number * WIDTH + tl.arange(0, WIDTH)
    source = parts + field(table, index, 5) + m[None, :]
    total = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, count, PARTS):
        i = (first + tl.arange(0, PARTS))[:, None]
        total += load_shared(source + i * length, (i < count) & (m < length)[None, :], 0.0)
    totals = tl.sum(total, 0)
    tl.store(s + field(table, index, 6) + m, totals, m < length)
    tl.store(norms + ticket, tl.sum(totals * totals, 0))
    return index


@triton.jit
def add_up(values, count):
    total = tl.zeros((256,), tl.float32)
    for first in range(0, count, 256):
        i = first + tl.arange(0, 256)
        total += load_shared(values + i, i < count, 0.0)
    return tl.sum(total, 0)


@triton.jit
def finish(
    weights, outs, us, vs, new_us, new_vs, sigmas, table, blocks, ticket, arrived, t, s, t_norms, s_norms, eps,
    COUNT: tl.constexpr, TRANSPOSED: tl.constexpr, ITERATE: tl.constexpr, LAST: tl.constexpr, DIVIDE: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes u and v: from t and s if ITERATE, else unchanged. LAST: sigma too. DIVIDE: weight / sigma too."""
    index, number, rows, _, columns, spread = part_of(table, blocks, ticket, WIDE)
    at = number * CHUNK + tl.arange(0, CHUNK)
    inside = at < rows * columns
    if DIVIDE:  # loads while other programs work
        value = tl.load(pick(weights, index, COUNT) + at, inside, 0.0).to(tl.float32)
    tiles = field(table, index, 8)
    sums = field(table, index, 10)
    if ITERATE:  # the programs that add the parts have waited for all products
        wait(arrived + COUNT + index, sums)
    else:
        wait(arrived + index, tiles)
    sigma = add_up(t_norms + field(table, index, 7), tiles)
    new_u = pick(new_us, index, COUNT)
    new_v = pick(new_vs, index, COUNT)
    if ITERATE:
        t_norm = tl.maximum(tl.sqrt(sigma), eps)
        s_norm = tl.sqrt(add_up(s_norms + field(table, index, 9), sums)) / t_norm
        sigma = s_norm * (s_norm / tl.maximum(s_norm, eps))
        lines = columns if TRANSPOSED else rows
        length = rows if TRANSPOSED else columns
        first = load_shared(t + field(table, index, 4) + at, at < lines, 0.0) / t_norm
        second = load_shared(s + field(table, index, 6) + at, at < length, 0.0) / t_norm / tl.maximum(s_norm, eps)
        position = at % spread * (columns // spread) + at // spread
        if TRANSPOSED:
            tl.store(new_v + position, first, at < lines)
            tl.store(new_u + at, second, at < length)
        else:
            tl.store(new_u + at, first, at < lines)
            tl.store(new_v + position, second, at < length)
    else:
        tl.store(new_u + at, tl.load(pick(us, index, COUNT) + at, at < rows), at < rows)
        tl.store(new_v + at, tl.load(pick(vs, index, COUNT) + at, at < columns), at < columns)
    if LAST:
        tl.store(pick(sigmas, index, COUNT), sigma, number == 0)
    if DIVIDE:
        out = pick(outs, index, COUNT)
        tl.store(out + at, (value / sigma).to(out.dtype.element_ty), inside)


@triton.jit
def iterate(
    weights, outs, us, vs, new_us, new_vs, sigmas, table, lines, sums, elements, line_count, sum_count, counters, t,
    parts, s, t_norms, s_norms, eps, COUNT: tl.constexpr, TRANSPOSED: tl.constexpr, ITERATE: tl.constexpr,
    LAST: tl.constexpr, DIVIDE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The ticket's part of one of the three steps. counters: the tickets drawn, then the programs that have arrived per
    weight in the first step, then in the second. Without ITERATE: sigma of the u and v that were passed."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    arrived = counters + 1
    if ticket < line_count:
        vectors = us if TRANSPOSED else vs
        others = vs if TRANSPOSED else us
        index = products(weights, vectors, others, table, lines, ticket, t, parts, t_norms, COUNT, TRANSPOSED, ITERATE,
                         WIDE, ROWS, COLUMNS)  # fmt: skip
        arrive(arrived + index)
    elif ticket < line_count + sum_count:
        index = add_parts(table, sums, ticket - line_count, arrived, parts, s, s_norms, TRANSPOSED, WIDE, PARTS, WIDTH)
        arrive(arrived + COUNT + index)
    else:
        finish(weights, outs, us, vs, new_us, new_vs, sigmas, table, elements, ticket - line_count - sum_count, arrived,
               t, s, t_norms, s_norms, eps, COUNT, TRANSPOSED, ITERATE, LAST, DIVIDE, WIDE, CHUNK)  # fmt: skip


@triton.jit
def grad_dots(grads, weights, table, blocks, dots, COUNT: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Partial sums of grad . weight."""
    index, number, rows, _, columns, _ = part_of(table, blocks, tl.program_id(0), WIDE)
    at = number * CHUNK + tl.arange(0, CHUNK)
    inside = at < rows * columns
    g = tl.load(pick(grads, index, COUNT) + at, inside, 0.0).to(tl.float32)
    w = tl.load(pick(weights, index, COUNT) + at, inside, 0.0).to(tl.float32)
    tl.store(dots + tl.program_id(0), tl.sum(g * w, 0))


@triton.jit
def grad_weights(
    grads, sigmas, grad_sigmas, us, vs, outs, table, blocks, dots, COUNT: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """grad / sigma + (grad_sigma - grad . weight / sigma^2) u v^T."""
    index, number, rows, inner, columns, spread = part_of(table, blocks, tl.program_id(0), WIDE)
    at = number * CHUNK + tl.arange(0, CHUNK)
    inside = at < rows * columns
    sigma = tl.load(pick(sigmas, index, COUNT))
    dot = add_up(dots + field(table, index, 11), tl.cdiv(rows * columns, CHUNK))
    slope = tl.load(pick(grad_sigmas, index, COUNT)) - dot / (sigma * sigma)
    m = at // (rows * inner) * inner + at % inner
    u = tl.load(pick(us, index, COUNT) + at // inner % rows, inside, 0.0)
    v = tl.load(pick(vs, index, COUNT) + m % spread * (columns // spread) + m // spread, inside, 0.0)
    g = tl.load(pick(grads, index, COUNT) + at, inside, 0.0).to(tl.float32)
    out = pick(outs, index, COUNT)
    tl.store(out + at, (g / sigma + slope * u * v).to(out.dtype.element_ty), inside)


def _dense(weight: Tensor, dim: int) -> Tensor:
    """The weight in a memory order that `matrix` describes."""
    return in_order(weight, is_channels_last(weight) and dim < 2)


def _groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of weights that share a launch: of one dtype, MAX_WEIGHTS at most."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, weight in enumerate(weights):
        by_dtype.setdefault(weight.dtype, []).append(i)
    return [indices[i : i + MAX_WEIGHTS] for indices in by_dtype.values() for i in range(0, len(indices), MAX_WEIGHTS)]


def forward(weights, us, vs, dims, n_power_iterations, eps, v_first, divide):
    """The op fastgen::spectral_norm."""
    outs, sigmas, new_us, new_vs = ([None] * len(weights) for _ in range(4))
    for indices in _groups(weights):
        lists = ([list_[i] for i in indices] for list_ in (weights, us, vs, dims))
        results = _forward(*lists, n_power_iterations, eps, v_first, divide)
        for i, *result in zip(indices, *results, strict=True):
            outs[i], sigmas[i], new_us[i], new_vs[i] = result
    return outs, sigmas, new_us, new_vs


def _forward(weights, us, vs, dims, n_power_iterations, eps, v_first, divide):
    dense = [_dense(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    like = dense[0]
    plan = Plan.of(tuple(matrix(w, dim) for w, dim in zip(dense, dims, strict=True)), v_first, like.device)
    outs = [torch.empty_like(weight) if divide else weight.new_empty(0) for weight in dense]
    sigmas = [weight.new_empty((), dtype=torch.float32) for weight in dense]
    vectors = [[t.float().contiguous() for t in tensors] for tensors in (us, vs)]
    new_vectors = [[torch.empty_like(t) for t in tensors] for tensors in vectors]
    t, parts, s, t_norms, s_norms = (
        like.new_empty(max(1, size), dtype=torch.float32)
        for size in (plan.t, plan.parts, plan.s, len(plan.lines), len(plan.sums))
    )
    iterates = n_power_iterations > 0
    launches = max(1, n_power_iterations)
    counters = like.new_zeros((launches, 1 + 2 * plan.count), dtype=torch.int32)
    for i in range(launches):
        last = i == launches - 1
        divides = divide and last
        elements, sums = plan.elements if divides else plan.vectors, len(plan.sums) if iterates else 0
        launch(
            iterate, (len(plan.lines) + sums + len(elements),), like, weights=tuple(dense), outs=tuple(outs),
            us=tuple(vectors[0]), vs=tuple(vectors[1]), new_us=tuple(new_vectors[0]), new_vs=tuple(new_vectors[1]),
            sigmas=tuple(sigmas), table=plan.table, lines=plan.lines, sums=plan.sums, elements=elements,
            line_count=len(plan.lines), sum_count=sums, counters=counters[i], t=t, parts=parts, s=s, t_norms=t_norms,
            s_norms=s_norms, eps=eps, COUNT=plan.count, TRANSPOSED=v_first, ITERATE=iterates, LAST=last,
            DIVIDE=divides, ROWS=ROWS, COLUMNS=COLUMNS, PARTS=PARTS, WIDTH=WIDTH, CHUNK=CHUNK, WIDE=wide(*dense),
            warps=8,
        )  # fmt: skip
        vectors = new_vectors  # a weight's vectors are written after all its products
    if divide:
        outs = [in_order(out, is_channels_last(weight)) for out, weight in zip(outs, weights, strict=True)]
    return (
        outs,
        sigmas,
        *([new.to(t.dtype) for new, t in zip(*pair, strict=True)] for pair in zip(new_vectors, (us, vs), strict=True)),
    )


def backward(grad_outs, grad_sigmas, weights, sigmas, us, vs, dims):
    """The op fastgen::spectral_norm_backward."""
    grads: list = [None] * len(weights)
    for indices in _groups(weights):
        lists = ([list_[i] for i in indices] for list_ in (grad_outs, grad_sigmas, weights, sigmas, us, vs, dims))
        for i, grad in zip(indices, _backward(*lists), strict=True):
            grads[i] = grad
    return grads


def _backward(grad_outs, grad_sigmas, weights, sigmas, us, vs, dims):
    dense = [_dense(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    grads = [in_order(g.to(w.dtype), is_channels_last(w)) for g, w in zip(grad_outs, dense, strict=True)]
    like = dense[0]
    plan = Plan.of(tuple(matrix(w, dim) for w, dim in zip(dense, dims, strict=True)), False, like.device)
    outs = [torch.empty_like(weight) for weight in dense]
    dots = like.new_empty(len(plan.elements), dtype=torch.float32)
    shared = {"grads": tuple(grads), "table": plan.table, "blocks": plan.elements, "COUNT": plan.count, "CHUNK": CHUNK,
              "WIDE": wide(*dense)}  # fmt: skip
    grid = (len(plan.elements),)
    launch(grad_dots, grid, like, weights=tuple(dense), dots=dots, **shared)
    vectors = {
        name: tuple(t.float().contiguous() for t in tensors)
        for name, tensors in (("sigmas", sigmas), ("grad_sigmas", grad_sigmas), ("us", us), ("vs", vs))
    }
    launch(grad_weights, grid, like, outs=tuple(outs), dots=dots, **vectors, **shared)
    return [in_order(out, is_channels_last(weight)) for out, weight in zip(outs, weights, strict=True)]
