"""Fastgen's ops on a GPU: parity, then time beside PyTorch's. python -m benchmarks.gpu FOLDER writes FOLDER/<gpu>.json
and .md.

It does one stage after the other, writes after each, and stops in time for 9 minutes in all; of the same commit the
next run does what this one left. Before the times it measures what `auto` is to choose, into the file of this chip that
fastgen brings: commit that too.

Times are medians over CUDA events with a cold L2 cache, in one process; every row says whether its result was right.
Without a GPU it says what it skips and runs the kernels' proofs.
"""

import copy
import datetime
import functools
import json
import math
import operator
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_parity import TOLERANCE, parity, tiers
from benchmarks.test_training import GAN, distance, prepared, stepper
from benchmarks.traffic import H200, Work, as_launched, work
from fastgen import Engine, nn, ops
from fastgen.inference._tune import milliseconds as once
from fastgen.inference._tune import tune_call
from fastgen.ops import _choices, _dispatch
from tests.cases import BIGGAN_128, LARGE, ON_GPU, OpCase
from tests.support.observe import differentiable
from tests.support.tolerance import error

SECONDS = 450  # no stage starts later; what is left out then is said
END = 525  # a stage that runs then ends, and keeps the rows that it made
TUNING = 90  # seconds for auto's choices
LAYERS = [*LARGE, *ON_GPU]
BATCHES = (64, 512)
TAIL = OpCase(
    "norm_act", "dcgan64-g2", {"x": (512, 128, 16, 16), "norm_weight": (128,), "norm_bias": (128,)},
    {"training": True, "activation": "relu"},
)  # fmt: skip
MEMORY_BOUND = {
    "norm_act": TAIL.id,
    "reparameterize": "reparameterize_kl",
    "spectral_norm": "spectral_norm BigGAN-128 D",
}
NOISE = 1 << 24  # elements of the sampler's row
Clock = Callable[[Callable[[], object]], float]


class OutOfTimeError(BaseException):
    """Raised by a clock in whatever runs then; no peer's failure, so that none takes it for its own."""


def out_of_time(*_: object) -> None:
    raise OutOfTimeError("the time was over")


def modelled(call: Callable[[], object]) -> float:
    """Milliseconds that an H200's rates leave to what Triton's kernels launch for a call."""
    with _dispatch.kernels("_common").recorded() as launches, ops.use_impl("triton"):
        call()
    return 1e3 * as_launched(launches, H200)


def trained(call: Callable, inputs: dict[str, torch.Tensor]) -> object:
    """Forward and backward."""
    out = call(inputs)
    return torch.autograd.grad(out, [t for t in inputs.values() if t.requires_grad], torch.ones_like(out))


def as_modelled(case: OpCase, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """By pass."""
    with torch.no_grad():
        forward = modelled(functools.partial(case.call, inputs))
    return {"forward": forward, "forward + backward": modelled(functools.partial(trained, case.call, inputs))}


def floors() -> None:
    """Prints what H200's rates leave to each layer, by its shapes and as Triton's kernels are launched. In the
    interpreter."""
    print(
        "| bfloat16, channels_last | forward, floor, ms | as launched | forward + backward, floor | as launched | "
        "measured |"
    )
    print("|---" * 6 + "|")
    for case in LAYERS:
        inputs = differentiable(case.tensors(torch.bfloat16, True))
        cells = []
        for what, launched in as_modelled(case, inputs).items():
            cells += [1e3 * work(case, torch.bfloat16, what != "forward").floor(H200, "16 bits"), launched]
        print(f"| {case.id}, {case.shapes['x'][0]} | {' | '.join(f'{ms:.4f}' for ms in cells)} | not yet |")


def milliseconds(call, scratch: torch.Tensor, rounds: int = 20) -> float:
    """The median, each round after a write of more than the L2 cache holds."""
    for _ in range(5):
        call()
    return statistics.median(once(call, scratch) for _ in range(rounds))


def peers(case: OpCase):
    """(name, whether in channels_last, call) of each contender."""
    reference = functools.partial(case.call, impl="reference")
    yield "eager", False, reference
    yield "eager channels_last", True, reference
    torch._dynamo.reset()
    yield "max-autotune channels_last", True, torch.compile(reference, mode="max-autotune")
    for tier, reason in tiers().items():
        if reason is None:
            yield f"fastgen {tier}", True, functools.partial(case.call, impl=tier)
    yield "fastgen auto", True, functools.partial(case.call, impl="auto")


def large() -> list[OpCase]:
    """The layers that are measured, at each batch size; those of one image as they are."""
    cases = []
    for batch in BATCHES:
        for case in LAYERS:
            n, *size = case.shapes["x"]
            if n > 1 or batch == BATCHES[0]:
                cases.append(replace(case, shapes=case.shapes | {"x": (1 if n == 1 else batch, *size)}))
    return cases


def tune(device: str = "cuda") -> list[str]:
    """Measures auto's choices for the layers in bfloat16 and channels_last, and says what the time did not suffice for.

    What was chosen lies among the files that fastgen brings.
    """

    def call():
        for case in large():
            trained(
                case.call,
                differentiable({name: t.to(device) for name, t in case.tensors(torch.bfloat16, True).items()}),
            )

    report = tune_call(call, seconds=TUNING, progress=print, folder=_choices.SHIPPED)
    print(report)
    return [f"auto's choice of {question}" for question in report.left_out]


def prefer(document: dict) -> None:
    """Of each op that memory bounds, lets `auto` take the tier that was faster in training by its rows."""
    chosen = {}
    for op, case in MEMORY_BOUND.items():
        both = [row for row in document["rows"] if row["case"] == case and row["what"] == "forward + backward"]
        ms = {row["peer"].removeprefix("fastgen "): row["ms"] for row in both if row["correct"]}
        ms = {tier: ms[tier] for tier in _dispatch.GPU_TIERS if tier in ms}
        if len(ms) == 2:
            chosen[op] = (min(ms, key=ms.__getitem__), ms)
    if chosen:
        _choices.save(_choices.chip("cuda:0") or "", chosen, _choices.SHIPPED)


def others(scratch: torch.Tensor):
    """Rows of the sampler and of spectral norm, in training, float32."""
    mu, logvar = (torch.randn(NOISE // 1024, 1024, device="cuda").requires_grad_() for _ in range(2))
    able = [tier for tier, reason in tiers().items() if reason is None]

    def eager(mu, logvar):
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
        return mu + (0.5 * logvar).exp() * torch.randn_like(logvar), kl

    calls = {"eager": eager, "max-autotune": torch.compile(eager, mode="max-autotune-no-cudagraphs")}
    calls |= {f"fastgen {tier}": functools.partial(ops.reparameterize_kl, impl=tier) for tier in able}
    upstream = [torch.randn_like(mu), torch.randn(len(mu), device="cuda")]
    for peer, call in calls.items():
        kl = call(mu, logvar)[1].detach()
        worst = error(kl, eager(mu.detach().double(), logvar.detach().double())[1])
        facts = {"case": "reparameterize_kl", "batch": len(mu), "dtype": "torch.float32", "peer": peer}
        for what, bytes_ in (("forward", 12 * NOISE), ("forward + backward", 32 * NOISE)):

            def run(call=call, peer=peer, backward=what != "forward"):
                with torch.set_grad_enabled(backward), ops.use_impl(peer.split()[-1] if "fastgen" in peer else "auto"):
                    out = call(mu, logvar)
                    if backward:
                        torch.autograd.grad(out, (mu, logvar), upstream)

            floor = 1e3 * Work(bytes_, 0).floor(H200, "16 bits")
            found = {"what": what, "ms": milliseconds(run, scratch), "floor_ms_h200": floor}
            yield facts | found | {"error": worst, "correct": worst < 1e-5}

    def layers(norm):
        torch.manual_seed(0)
        convolutions = [torch.nn.Conv2d(s[1], s[0], s[2], bias=False, device="cuda") for s in BIGGAN_128]
        return torch.nn.ModuleList(norm(convolution) for convolution in convolutions)

    def accesses(model):
        return [layer.weight for layer in model]

    size = 4 * sum(math.prod(shape) for shape in BIGGAN_128)
    theirs = torch.nn.utils.parametrizations.spectral_norm
    exact = None
    for peer in ("eager", "max-autotune", *(f"fastgen {tier}" for tier in able)):
        model = layers(nn.spectral_norm if "fastgen" in peer else theirs)
        group = nn.SpectralNormGroup(model) if "fastgen" in peer else None
        access = torch.compile(accesses, mode="max-autotune-no-cudagraphs") if peer == "max-autotune" else accesses
        originals = [layer.parametrizations.weight.original for layer in model]
        weights = [torch.randn_like(t) for t in originals]
        with torch.no_grad():
            first = access(model.eval())[0]
        exact = first.double() if exact is None else exact
        worst = error(first, exact)
        model.train()
        facts = {"case": "spectral_norm BigGAN-128 D", "batch": 1, "dtype": "torch.float32", "peer": peer}
        for what, bytes_ in (("forward", 3 * size), ("forward + backward", 7 * size)):

            def run(peer=peer, group=group, access=access, model=model, backward=what != "forward", weights=weights,
                    originals=originals):  # fmt: skip
                with torch.set_grad_enabled(backward), ops.use_impl(peer.split()[-1] if "fastgen" in peer else "auto"):
                    if group is not None:
                        group.update()
                    out = access(model)
                    if backward:
                        torch.autograd.grad(out, originals, weights)

            floor = 1e3 * Work(bytes_, 0).floor(H200, "16 bits")
            found = {"what": what, "ms": milliseconds(run, scratch), "floor_ms_h200": floor}
            yield facts | found | {"error": worst, "correct": worst < 1e-4}


def networks(clock: Clock, device: str = "cuda", batch: int = 512) -> Iterator[dict]:
    """Rows of DCGAN-64 as a whole, in bfloat16: a training step, and its generator in inference, one image at a
    time."""
    torch.manual_seed(0)
    model = GAN().to(device)
    inputs = [t.to(device) for t in model.inputs(batch)]
    exact = stepper(copy.deepcopy(model).double(), [t.double() for t in inputs], "fp32")(False)
    with FlopCounterMode(display=False) as counter:
        stepper(copy.deepcopy(model), inputs, "fp32")(False)
    facts = {"case": "DCGAN-64 training step", "batch": batch, "dtype": "torch.bfloat16", "what": "step"}
    floor = 1e3 * Work(0, counter.get_total_flops()).floor(H200, "16 bits")
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    allowed = 0.0
    for name, peer, mode in (
        ("eager channels_last", "eager", None),
        (
            "max-autotune channels_last",
            "compile",
            "max-autotune-no-cudagraphs",
        ),  # graphs break on calls of one D in turns
        ("fastgen auto", "fastgen", None),
    ):
        torch._dynamo.reset()
        own = copy.deepcopy(model).to(memory_format=torch.channels_last)
        prepared(own, peer, mode)
        step = stepper(own, inputs, "bf16")
        worst = distance(step(False), exact)
        allowed = allowed or 2 * worst
        found = {"ms": clock(step), "floor_ms_h200": floor, "error": worst, "correct": worst < allowed}
        yield facts | {"peer": name} | found

    generator = model.generator.eval().requires_grad_(False)
    z = inputs[1][:1].contiguous()
    exact_image = copy.deepcopy(generator).double()(z.double())
    size = sum(p.numel() for p in generator.parameters()) * 2
    facts = {"case": "DCGAN-64 generator", "batch": 1, "dtype": "torch.bfloat16", "what": "inference"}
    half = copy.deepcopy(generator).to(torch.bfloat16, memory_format=torch.channels_last)
    engine = Engine(generator, z, precision="bf16")
    peers = {
        "eager channels_last": (half, z.bfloat16()),
        "reduce-overhead channels_last": (torch.compile(half, mode="reduce-overhead"), z.bfloat16()),
        "max-autotune channels_last": (torch.compile(half, mode="max-autotune"), z.bfloat16()),
        "fastgen Engine": (engine, z),
    }
    for name, (call, given) in peers.items():
        with torch.no_grad():
            worst = error(call(given), exact_image)
            found = {
                "ms": clock(functools.partial(call, given)),
                "floor_ms_h200": 1e3 * Work(size, 0).floor(H200, "16 bits"),
            }
        yield facts | {"peer": name} | found | {"error": worst, "correct": worst < 3e-2}


def measure(case: OpCase, dtype: torch.dtype, scratch: torch.Tensor) -> Iterator[dict]:
    """A layer's rows."""
    tensors = {name: t.cuda() for name, t in case.tensors(dtype, True).items()}
    exact = case.call({n: t.double() for n, t in tensors.items()}, impl="reference")
    launched = as_modelled(case, differentiable({n: t.clone() for n, t in tensors.items()}))
    for name, channels_last, call in peers(case):
        inputs = differentiable({n: t.clone() for n, t in tensors.items()})
        if not channels_last:
            inputs = differentiable({n: t.detach().contiguous() for n, t in inputs.items()})
        facts = {"case": case.id, "batch": case.shapes["x"][0], "dtype": str(dtype), "peer": name}
        try:
            worst = error(call(inputs).detach(), exact)

            tier = name.split()[-1] if "fastgen" in name else "auto"  # of the backward pass too

            def forward(call=call, inputs=inputs):
                with torch.no_grad():
                    call(inputs)

            def both(call=call, inputs=inputs, tier=tier):
                with ops.use_impl(tier):
                    trained(call, inputs)

            for what, run in (("forward", forward), ("forward + backward", both)):
                floor = 1e3 * work(case, dtype, what != "forward").floor(H200, "16 bits")
                found = {"what": what, "ms": milliseconds(run, scratch), "floor_ms_h200": floor}
                found["launched_ms_h200"] = launched[what]
                yield facts | found | {"error": worst, "correct": worst < TOLERANCE[dtype]}
        except Exception as failed:  # a peer that cannot run is a row that says so
            yield facts | {"what": "forward", "ms": None, "failed": f"{type(failed).__name__}: {failed}"[:200]}


def said(*command: str) -> str:
    """What a command prints; "unknown" where there is no such program, or it fails: a copy without git's folder,
    say."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return "unknown" if done.returncode else done.stdout.strip()


def environment() -> dict:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(),
        "commit": said("git", "rev-parse", "HEAD"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def table(document: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    lines = [
        f"{about}. cudnn.benchmark, cold L2 cache, medians. Parity: {'; '.join(document['wrong']) or 'all right'}. "
        f"Tiers: {document['tiers']}. Sanitizer: {'; '.join(document['sanitizer']) or 'nothing found'}. "
        f"Left out for time: {', '.join(document['left_out']) or 'nothing'}. "
        f"Failed: {'; '.join(document['failed']) or 'nothing'}. An H200's floor: of fastgen's passes by the shapes, "
        "and of all that Triton's launches move and multiply.",
        "", "| case | batch | precision | pass | peer | ms | floor, ms | as launched, ms | right |", "|---" * 9 + "|",
    ]  # fmt: skip
    for row in document["rows"]:
        if row["ms"] is None:
            end = f"{row['failed']} | | | no"
        else:
            launched = f"{row['launched_ms_h200']:.3f}" if "launched_ms_h200" in row else ""
            end = f"{row['ms']:.3f} | {row['floor_ms_h200']:.3f} | {launched} | {'yes' if row['correct'] else 'no'}"
        lines.append(f"| {row['case']} | {row['batch']} | {row['dtype'][6:]} | {row['what']} | {row['peer']} | {end} |")
    return "\n".join(lines) + "\n"


def stages(scratch: torch.Tensor) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Each one's name, and what adds to the document that it is given what the stage found."""
    yield "parity", parity
    yield "auto's choices", lambda document: document["left_out"].extend(tune())
    yield "sampler and spectral norm", functools.partial(add_rows, rows=others(scratch))
    yield TAIL.id, functools.partial(add_rows, rows=measure(TAIL, torch.bfloat16, scratch))
    yield "tiers of the ops that memory bounds", prefer
    yield "networks", functools.partial(add_rows, rows=networks(functools.partial(milliseconds, scratch=scratch)))
    for case in large():
        rows = measure(case, torch.bfloat16, scratch)
        yield f"{case.id} at batch {case.shapes['x'][0]}", functools.partial(add_rows, rows=rows)


_KEY = operator.itemgetter("case", "batch", "dtype", "what", "peer")


def add_rows(document: dict, rows: Iterator[dict]) -> None:
    """Those that are made before one fails; a row that is there already is made anew."""
    for row in rows:
        document["rows"] = [old for old in document["rows"] if _KEY(old) != _KEY(row)] + [row]


def started(file: Path, about: dict) -> dict:
    """The document to go on with: what the file holds of the same commit, if it is known, and machine, else an empty
    one."""
    before = json.loads(file.read_text()) if file.exists() else {}
    same = before and before["environment"] | {"date": about["date"]} == about and about["commit"] != "unknown"
    kept = before if same else {"wrong": [], "sanitizer": [], "rows": [], "done": []}
    return {**kept, "environment": about, "left_out": [], "failed": []}


def run(document: dict, stages: Iterable[tuple[str, Callable[[dict], None]]], deadline: float, keep: Callable) -> None:
    """The stages that are not done, as far as the time goes; keep(document) after each."""
    for name, stage in stages:
        if name in document["done"]:
            continue
        if time.monotonic() > deadline:
            document["left_out"].append(name)
            continue
        try:
            stage(document)
            document["done"].append(name)
        except (Exception, OutOfTimeError) as error:  # a session on a GPU is rare: what else it can measure is measured
            document["failed"].append(f"{name}: {type(error).__name__}: {error}"[:300])
        keep(document)
    keep(document)


def main(folder: Path) -> int:
    if not torch.cuda.is_available():
        print("no GPU: parity on the GPU and the measurements are skipped; no speed of the GPU's kernels is measured "
              "yet. Floors, each by the shapes and as launched:", flush=True)  # fmt: skip
        printed = [sys.executable, "-c", "from benchmarks import gpu; gpu.floors()"]
        subprocess.run(printed, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
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
