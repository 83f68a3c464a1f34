"""fastgen's ops on a GPU: parity, then times beside PyTorch's. python -m benchmarks.gpu FOLDER writes FOLDER/<gpu>.json
and .md.

It runs one stage after another, writes after each, and stops within 9 minutes; the next run of the same commit does the
stages that are missing. Before the timings it measures the choices for `auto`, into the file for this chip that is part
of fastgen: commit that file too.

Times are medians over CUDA events with a cold L2 cache, in one process; each row says whether its result was right.
Without a GPU it says what it skips, prints the floors and runs the tests of the GPU kernels.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu_networks, gpu_ops
from benchmarks.gpu_layers import NORM_ACT, large, measure, prefer, tune
from benchmarks.gpu_parity import parity, tiers
from benchmarks.gpu_session import add_rows, environment, milliseconds, out_of_time, run, started, table

SECONDS = 450  # no stage starts later; stages that are left out are listed
END = 525  # a stage that is still running ends, and keeps the rows that it has made


def stages(scratch: torch.Tensor) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """The name of each stage, and the function that adds its results to a document."""
    yield "parity", parity
    yield "auto's choices", lambda document: document["left_out"].extend(tune())
    yield "sampler", functools.partial(add_rows, rows=gpu_ops.sampler(scratch))
    yield "spectral norm", functools.partial(add_rows, rows=gpu_ops.spectral_norm(scratch))
    yield NORM_ACT.id, functools.partial(add_rows, rows=measure(NORM_ACT, torch.bfloat16, scratch))
    yield "tiers of the memory-bound ops", prefer
    clock = functools.partial(milliseconds, scratch=scratch)
    yield "networks", functools.partial(add_rows, rows=gpu_networks.networks(clock))
    for case in large():
        rows = measure(case, torch.bfloat16, scratch)
        yield f"{case.id} at batch {case.shapes['x'][0]}", functools.partial(add_rows, rows=rows)


def main(folder: Path) -> int:
    if not torch.cuda.is_available():
        print("no GPU: parity and measurements are skipped. Floors, by the shapes and as launched:", flush=True)
        floors = [sys.executable, "-m", "benchmarks.gpu_floors"]
        subprocess.run(floors, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return subprocess.run([sys.executable, "-m", "pytest", "-n", "2", "tests/kernels", "tests/cuda"]).returncode
    deadline = time.monotonic() + SECONDS
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(END)
    torch.backends.cudnn.benchmark = True
    about = environment()
    file = folder / f"{about['gpu'].lower().replace(' ', '-')}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def keep(document: dict) -> None:
        for kept, text in ((file, json.dumps(document, indent=1)), (file.with_suffix(".md"), table(document))):
            partial = kept.with_name(f"{kept.name}.partial")
            partial.write_text(text)
            os.replace(partial, kept)

    document = started(file, about) | {"tiers": {tier: reason or "runs" for tier, reason in tiers().items()}}
    run(document, stages(torch.empty(256 << 20, dtype=torch.uint8, device="cuda")), deadline, keep)
    signal.alarm(0)
    print(table(document))
    return 1 if document["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
