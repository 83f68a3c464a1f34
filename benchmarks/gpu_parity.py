"""Whether the kernels are right on a GPU: parity with the float64 reference, and what compute-sanitizer finds."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from fastgen import ops
from fastgen.ops import _tiers
from tests.cases import SAMPLER, SMALL, SPECTRAL, OpCase
from tests.support.observe import differentiable, observe
from tests.support.tolerance import error

PARITY = 200  # seconds after which no more parity cases start
HANGS = 200  # seconds after which a case counts as hanging
CASES = (*SMALL, *SAMPLER, *SPECTRAL)
PRECISIONS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "tf32"))  # of a convolution's products
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def tiers(device: str = "cuda:0") -> dict[str, str | None]:
    """For each of fastgen's GPU tiers, why it cannot run on this machine, or None."""
    return {tier: _tiers.why_not("norm_act", tier, device, torch.float32) for tier in _tiers.GPU_TIERS}


def parity(document: dict) -> None:
    """Adds the results that differ from the float64 reference by more than the table allows, and compute-sanitizer's
    findings.

    Each case runs in its own process: most of the time goes to compilers, and a kernel that hangs or writes out of
    bounds ends its process.
    """
    tiers()  # builds the CUDA kernels, once
    deadline = time.monotonic() + PARITY
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2)) as pool:
        sanitizer = pool.submit(sanitized)
        for lines in pool.map(functools.partial(case_apart, deadline=deadline), range(len(CASES))):
            document["wrong"] += lines
        document["sanitizer"] += sanitizer.result()


def case_apart(index: int, deadline: float) -> list[str]:
    """The result of `wrong_of` in another process."""
    name = CASES[index].id
    if time.monotonic() > deadline:
        return [f"{name}: not checked for lack of time"]
    command = [
        sys.executable,
        "-c",
        f"from benchmarks import gpu_parity; print(*gpu_parity.wrong_of({index}), sep='\\n')",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    except subprocess.TimeoutExpired:
        return [f"{name}: no result after {HANGS} seconds"]
    if done.returncode:
        return [f"{name}: {' '.join(done.stderr.split())[-300:]}"]
    return [line for line in done.stdout.splitlines() if line]


def wrong_of(index: int, device: str = "cuda") -> list[str]:
    """The results of a case that are wrong, by tier, dtype and layout."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    case, wrong = CASES[index], []
    able = [tier for tier, reason in tiers(device).items() if reason is None]
    if case not in SMALL:
        for tier in able:
            try:
                wrong += [] if agrees(case, tier, device) else [f"{tier}: {case.id}: differs"]
            except Exception as failed:
                wrong.append(f"{tier}: {case.id}: {' '.join(str(failed).split())}"[:300])
        return wrong
    for dtype, channels_last in itertools.product(TOLERANCE, (False, True)):
        tensors = case.tensors(dtype, channels_last)
        exact_inputs = {name: t.double() for name, t in tensors.items()}
        upstream = torch.ones_like(case.call({n: t.clone() for n, t in exact_inputs.items()}, impl="reference"))
        exact = observe(case, exact_inputs, upstream, "reference")

        def on_gpu(impl, tensors=tensors, upstream=upstream):
            with ops.use_impl(impl):
                return observe(case, {n: t.to(device) for n, t in tensors.items()}, upstream.to(device), impl)

        reference = on_gpu("reference")
        for tier in able:
            what = f"{tier}: {case.id} {dtype} channels_last={channels_last}"
            try:
                actual = on_gpu(tier)
            except Exception as failed:  # a kernel that does not run is wrong; go on with the others
                wrong.append(f"{what}: {' '.join(str(failed).split())}"[:300])
                continue
            for name in exact:
                if name == "grad of bias" and case.batch_stats:
                    continue
                allowed = case.allowed(error(reference[name].cpu(), exact[name]), dtype, name)
                if not error(actual[name].cpu(), exact[name]) <= allowed:
                    wrong.append(f"{what}: {name}")
    return wrong


def agrees(case: OpCase, tier: str, device: str) -> bool:
    """Whether results and gradients of a sampler or a spectral norm are the reference's, in float32 and for the same
    key."""
    found = []
    for impl in ("reference", tier):
        torch.manual_seed(0)  # seeds the CPU's generator for the inputs and the GPU's for the key
        tensors = {name: t.to(device).requires_grad_() for name, t in case.tensors(torch.float32).items()}
        with ops.use_impl(impl):
            outs = case.call(tensors, impl=impl)
            outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t.requires_grad]
            leaves = list(tensors.values())
            grads = torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs], allow_unused=True)
        found.append([t for t in (*outs, *grads) if t is not None])
    return all(error(actual.detach(), reference.detach()) < 1e-4 for reference, actual in zip(*found, strict=True))


def sanitized() -> list[str]:
    """compute-sanitizer's findings for the CUDA kernels in the smallest cases: one line per tool that fails."""
    from torch.utils.cpp_extension import CUDA_HOME

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin")
    if tool is None:
        return ["compute-sanitizer is not installed: not run"]
    # Without caching, memory beyond the end of a tensor does not belong to another tensor.
    apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    smallest = "from benchmarks import gpu_parity; gpu_parity.smallest()"
    findings = []
    for check in ("memcheck", "racecheck"):
        command = [tool, f"--tool={check}", "--error-exitcode=3", sys.executable, "-c", smallest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=apart, timeout=HANGS)
        except subprocess.TimeoutExpired:
            findings.append(f"{check}: no result after {HANGS} seconds")
            continue
        if done.returncode:
            findings.append(f"{check}: {' '.join((done.stdout + done.stderr).split())[-300:]}")
    return findings


def smallest() -> None:
    """Runs each op's first case, forward and backward, with the CUDA kernels: with FMA and each kind of tensor core."""
    firsts = {case.op: case for case in reversed(CASES)}
    for case, (dtype, precision) in itertools.product(firsts.values(), PRECISIONS):
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        tensors = {name: t.cuda() for name, t in case.tensors(dtype, channels_last=precision == "tf32").items()}
        with ops.use_impl("cuda"):
            out = case.call(differentiable(tensors), impl="cuda")
            sum(t.sum() for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad).backward()
    torch.cuda.synchronize()
