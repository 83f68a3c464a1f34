"""Fastgen's ops on a GPU: parity, then time beside PyTorch's. python -m benchmarks.gpu FOLDER writes FOLDER/<gpu>.json and .md.

Times are medians over CUDA events with a cold L2 cache, in one process; every row says whether its result was right. Without a
GPU it says what it skips.
"""

import datetime
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.traffic import H200, work
from tests.cases import LARGE, SMALL, OpCase
from tests.ops.test_cases import differentiable, error, observe

SECONDS = 420  # for the measurements; what is left out then is said
BATCHES = (64, 512)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def parity() -> list[str]:
    """Cases whose float32 or 16-bit results differ from the float64 reference by more than the table allows."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    wrong = []
    for case in SMALL:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels_last in (False, True):
                tensors = case.tensors(dtype, channels_last)
                exact_inputs = {name: t.double() for name, t in tensors.items()}
                upstream = torch.ones_like(case.call({n: t.clone() for n, t in exact_inputs.items()}, impl="reference"))
                exact = observe(case, exact_inputs, upstream, "reference")
                theirs, ours = (
                    observe(case, {n: t.cuda() for n, t in tensors.items()}, upstream.cuda(), impl)
                    for impl in ("reference", "triton")
                )
                for name in exact:
                    if name == "grad of bias" and case.batch_stats:
                        continue
                    allowed = case.allowed(error(theirs[name].cpu(), exact[name]), dtype, name)
                    if not error(ours[name].cpu(), exact[name]) <= allowed:
                        wrong.append(f"{case.id} {dtype} channels_last={channels_last}: {name}")
    return wrong


def milliseconds(call, scratch: torch.Tensor, rounds: int = 20) -> float:
    """The median, each round after a write of more than the L2 cache holds."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peers(case: OpCase):
    """(name, whether in channels_last, call) of each contender."""
    reference = functools.partial(case.call, impl="reference")
    yield "eager", False, reference
    yield "eager channels_last", True, reference
    torch._dynamo.reset()
    yield "max-autotune channels_last", True, torch.compile(reference, mode="max-autotune")
    yield "fastgen", True, functools.partial(case.call, impl="triton")


def measure(case: OpCase, dtype: torch.dtype, scratch: torch.Tensor) -> list[dict]:
    rows = []
    tensors = {name: t.cuda() for name, t in case.tensors(dtype, True).items()}
    exact = case.call({n: t.double() for n, t in tensors.items()}, impl="reference")
    for name, channels_last, call in peers(case):
        inputs = differentiable({n: t.clone() for n, t in tensors.items()})
        if not channels_last:
            inputs = differentiable({n: t.detach().contiguous() for n, t in inputs.items()})
        leaves = [t for t in inputs.values() if t.requires_grad]
        facts = {"case": case.id, "batch": case.shapes["x"][0], "dtype": str(dtype), "peer": name}
        try:
            worst = error(call(inputs).detach(), exact)

            def forward(call=call, inputs=inputs):
                with torch.no_grad():
                    call(inputs)

            def both(call=call, inputs=inputs, leaves=leaves):
                out = call(inputs)
                torch.autograd.grad(out, leaves, torch.ones_like(out))

            for what, run in (("forward", forward), ("forward + backward", both)):
                floor = 1e3 * work(case, dtype, what != "forward").floor(H200, "16 bits")
                found = {"what": what, "ms": milliseconds(run, scratch), "floor_ms_h200": floor}
                rows.append(facts | found | {"error": worst, "correct": worst < TOLERANCE[dtype]})
        except Exception as failed:  # a peer that cannot run is a row that says so
            rows.append(facts | {"what": "forward", "ms": None, "failed": f"{type(failed).__name__}: {failed}"[:200]})
    return rows


def environment() -> dict:
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver.stdout.strip(), "cuda": torch.version.cuda,
        "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(),
        "commit": commit.stdout.strip(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def table(document: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    lines = [
        f"{about}. cudnn.benchmark, cold L2 cache, medians. Parity: {'; '.join(document['wrong']) or 'all right'}. "
        f"Left out for time: {', '.join(document['left_out']) or 'nothing'}. Floor: of fastgen's passes on an H200.",
        "", "| case | batch | precision | pass | peer | ms | floor, ms | right |", "|---" * 8 + "|",
    ]  # fmt: skip
    for row in document["rows"]:
        if row["ms"] is None:
            end = f"{row['failed']} | | no"
        else:
            end = f"{row['ms']:.3f} | {row['floor_ms_h200']:.3f} | {'yes' if row['correct'] else 'no'}"
        lines.append(f"| {row['case']} | {row['batch']} | {row['dtype'][6:]} | {row['what']} | {row['peer']} | {end} |")
    return "\n".join(lines) + "\n"


def main(folder: Path) -> int:
    if not torch.cuda.is_available():
        print("no GPU: parity on the GPU and the measurements are skipped; no speed of the Triton kernels is "
              "measured yet. Floors on the H200, bfloat16, milliseconds (forward; forward + backward):")  # fmt: skip
        for case in LARGE:
            floors = (1e3 * work(case, torch.bfloat16, backward).floor(H200, "16 bits") for backward in (False, True))
            print(f"  {case.id:44}" + "".join(f"{floor:9.4f}" for floor in floors))
        return 0
    start, wrong = time.monotonic(), parity()
    torch.backends.cudnn.benchmark = True
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows, left_out = [], []
    for batch in BATCHES:
        for case in LARGE:
            if case.shapes["x"][0] == 1 and batch != BATCHES[0]:
                continue
            n = 1 if case.shapes["x"][0] == 1 else batch
            of_batch = OpCase(case.op, case.name, case.shapes | {"x": (n, *case.shapes["x"][1:])}, case.options, True)
            if time.monotonic() - start > SECONDS:
                left_out.append(f"{case.id} at batch {n}")
            else:
                rows += measure(of_batch, torch.bfloat16, scratch)
    document = {"environment": environment(), "wrong": wrong, "left_out": left_out, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    name = document["environment"]["gpu"].lower().replace(" ", "-")
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1))
    (folder / f"{name}.md").write_text(table(document))
    print(table(document))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
