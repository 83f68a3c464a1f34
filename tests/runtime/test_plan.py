"""The plan without torch: what it computes, and that no file makes it crash."""

import copy
import math
import os
import random
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from fastgen.runtime import Plan, PlanError
from fastgen.runtime import _steps as steps_module
from fastgen.runtime._file import HEADER, READ, RECORD, encode
from fastgen.runtime._steps import (
    Activation,
    Add,
    AvgPool,
    Concat,
    Convolution,
    Embedding,
    Epilogue,
    Geometry,
    Input,
    MaxPool,
    Mul,
    Narrow,
    Norm,
    NormAct,
    Output,
    PixelShuffle,
    Precision,
    Read,
    Reshape,
    Step,
    UpsampleBilinear,
    UpsampleNearest,
)


def small(precision: Precision = Precision.float32) -> bytes:
    """(3, 1, 1) -> transposed convolution, instance norm, leaky_relu -> convolution + residual, batch norm's map, tanh:
    (2, 4, 4)."""
    generator = np.random.default_rng(0)

    def floats(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    steps = [
        Input([], (3, 1, 1), 3),
        Convolution(
            [Read(0, (3, 1, 1))], (2, 4, 4), Geometry((4, 4), transposed=True), floats(3, 2, 4, 4), floats(2),
            epilogue=Epilogue(Norm.instance, activation=Activation.leaky_relu, negative_slope=0.2),
        ),
        Convolution(
            [Read(1, (2, 4, 4)), Read(1, (2, 4, 4))], (2, 4, 4), Geometry((3, 3), padding=(1, 1), reflect=True),
            floats(2, 2, 3, 3),
            epilogue=Epilogue(Norm.affine, mean=floats(2), var=floats(2) ** 2 + 1, activation=Activation.tanh),
        ),
        Concat([Read(1, (2, 4, 4)), Read(2, (2, 4, 4))], (4, 4, 4)),
        NormAct([Read(3, (4, 4, 4))], (4, 4, 4),
                Epilogue(Norm.group, num_groups=2, weight=floats(4), activation=Activation.silu)),
        Output([Read(4, (4, 4, 4))], (4, 4, 4), 3),
    ]  # fmt: skip
    return encode(steps, precision=precision)


def several(precision: Precision = Precision.float32) -> bytes:
    """(3, 4, 4), labels below 5 and (2, 1, 1) -> all kinds of steps that `small` lacks: (16), (2, 8, 8) and one
    number."""
    table = np.random.default_rng(0).random((5, 16), np.float32)
    steps = [
        Input([], (3, 4, 4), 3),
        Input([], (1, 1, 1), 0),
        Input([], (2, 1, 1), 3),
        Embedding([Read(1, (1, 1, 1))], (16, 1, 1), 5, table),
        Reshape([Read(3, (16, 1, 1))], (1, 4, 4)),
        Concat([Read(0, (3, 4, 4)), Read(4, (1, 4, 4))], (4, 4, 4)),
        Mul([Read(5, (4, 4, 4)), Read(4, (1, 4, 4))], (4, 4, 4)),
        UpsampleBilinear([Read(6, (4, 4, 4))], (4, 5, 7), align_corners=True),
        UpsampleNearest([Read(7, (4, 5, 7))], (4, 4, 4)),
        MaxPool([Read(8, (4, 4, 4))], (4, 4, 4), (3, 3), (1, 1), (1, 1)),
        Narrow([Read(9, (4, 4, 4))], (2, 4, 4), 1),
        Add([Read(10, (2, 4, 4)), Read(2, (2, 1, 1))], (2, 4, 4)),
        Output([Read(3, (16, 1, 1))], (16, 1, 1), 1),
        Concat([Read(11, (2, 4, 4)), Read(10, (2, 4, 4)), Read(9, (4, 4, 4))], (8, 4, 4)),
        PixelShuffle([Read(13, (8, 4, 4))], (2, 8, 8)),
        Output([Read(14, (2, 8, 8))], (2, 8, 8), 3),
        Narrow([Read(14, (2, 8, 8))], (1, 8, 8), 0),
        AvgPool([Read(16, (1, 8, 8))], (1, 1, 1), (8, 8), (8, 8), count_include_pad=True),
        Output([Read(17, (1, 1, 1))], (1, 1, 1), 0),
    ]
    return encode(steps, precision=precision)


PLANS = {"small": small, "several": several}


def given(plan: Plan, n: int) -> list[np.ndarray]:
    """Inputs for a plan: ones, and labels of class 0."""
    return [
        np.ones((n, *wanted.shape), np.float32) if wanted.classes is None else np.zeros(n, np.int64)
        for wanted in plan.inputs
    ]


def shapes(outputs) -> list[tuple[int, ...]]:
    return [out.shape for out in (outputs if isinstance(outputs, tuple) else (outputs,))]


def sealed(data: bytes) -> bytes:
    """The bytes with the checksum that they should have."""
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


def test_it_computes_what_numpy_does():
    weight = np.random.default_rng(0).standard_normal((5, 3, 1, 1)).astype(np.float32)
    bias = np.arange(5, dtype=np.float32)
    steps = [
        Input([], (3, 1, 1), 1),
        Convolution(
            [Read(0, (3, 1, 1))],
            (5, 1, 1),
            Geometry((1, 1)),
            weight,
            bias,
            epilogue=Epilogue(activation=Activation.relu),
        ),
        Output([Read(1, (5, 1, 1))], (5, 1, 1), 1),
    ]
    data = encode(steps)
    z = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    np.testing.assert_allclose(Plan(data)(z), np.maximum(z @ weight[:, :, 0, 0].T + bias, 0), rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs():
    plan = Plan(several())
    assert [wanted.classes for wanted in plan.inputs] == [None, 5, None]
    assert plan.output_shapes == ((16,), (2, 8, 8), ())
    rng = np.random.default_rng(1)
    x, labels, shift = rng.random((9, 3, 4, 4), np.float32), rng.integers(0, 5, 9), rng.random((9, 2, 1, 1), np.float32)
    whole = plan(x, labels, shift)
    assert shapes(whole) == [(9, 16), (9, 2, 8, 8), (9,)]
    table = np.random.default_rng(0).random((5, 16), np.float32)
    np.testing.assert_array_equal(whole[0], table[labels])
    np.testing.assert_allclose(whole[2], whole[1][:, 0].mean((1, 2)), rtol=1e-6)
    for threads in (1, None):
        again = Plan(several(), threads=threads)
        for i in range(9):
            one = again(x[i : i + 1], labels[i : i + 1].astype(np.uint8), shift[i : i + 1, :, 0, 0])
            for found, expected in zip(one, whole, strict=True):
                np.testing.assert_array_equal(found[0], expected[i])
    assert shapes(plan(x[:0], labels[:0], shift[:0])) == [(0, 16), (0, 2, 8, 8), (0,)]
    assert len(plan.profile(2, 1)) == len(plan.tune(2)) == 19
    for wrong, error, words in (
        ((x,), TypeError, "takes 3 inputs, got 1"),
        (
            (x, labels.astype(np.float32), shift),
            TypeError,
            r"inputs\[1\] must be labels of an integer dtype, got float32",
        ),
        ((x, labels[:4], shift), ValueError, r"inputs\[1\] must be of 9 images as inputs\[0\] is, got shape \(4,\)"),
        ((x, labels + 5, shift), IndexError, r"inputs\[1\] must be labels from 0 to 4"),
        ((x, labels - 5, shift), IndexError, r"inputs\[1\] must be labels from 0 to 4, got -\d for image 0"),
        ((x, labels, shift[:, :1]), ValueError, r"inputs\[2\] must be of shape \(N, 2, 1, 1\), got \(9, 1, 1, 1\)"),
    ):
        with pytest.raises(error, match=words):
            plan(*wrong)


def test_batches_and_thread_counts_give_the_same_images():
    data = small()
    z = np.random.default_rng(1).standard_normal((37, 3, 1, 1)).astype(np.float32)
    whole = Plan(data)(z)
    assert whole.shape == (37, 4, 4, 4) and np.isfinite(whole).all()
    np.testing.assert_array_equal(Plan(data, threads=1)(z), whole)
    np.testing.assert_allclose(
        np.concatenate([Plan(data)(z[i : i + 5]) for i in range(0, 37, 5)]), whole, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(Plan(data)(z[:, :, 0, 0]), whole)
    np.testing.assert_array_equal(Plan(data)(np.asfortranarray(z)), whole)
    assert Plan(data)(z[:0]).shape == (0, 4, 4, 4)


def test_non_finite_values_stay_in_their_image():
    z = np.ones((3, 3, 1, 1), np.float32)
    z[1, 0] = np.nan
    finite = np.isfinite(Plan(small())(z)).all(axis=(1, 2, 3))
    assert finite.tolist() == [True, False, True]


def test_several_threads_call_one_plan():
    plan = Plan(small())
    inputs = [np.random.default_rng(i).standard_normal((i % 9 + 1, 3, 1, 1)).astype(np.float32) for i in range(8)]
    expected = [plan(z) for z in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not np.array_equal(plan(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_too():
    code = """
import os, sys, numpy as np
from fastgen.runtime import Plan
plan = Plan(open(sys.argv[1], "rb").read())
z = np.ones((64, 3, 1, 1), np.float32)
expected = plan(z)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(plan(z), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fork-{os.getpid()}.fgplan")
    try:
        with open(path, "wb") as file:
            file.write(small())
        subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
    finally:
        os.unlink(path)


@pytest.mark.parametrize(
    ("z", "error", "words"),
    [
        ([1.0, 2.0, 3.0], TypeError, "numpy.ndarray, got list"),
        (np.ones((2, 3, 1, 1)), TypeError, "float32, got float64"),
        (np.ones((2, 4, 1, 1), np.float32), ValueError, r"\(N, 3, 1, 1\), got \(2, 4, 1, 1\)"),
        (np.ones((3,), np.float32), ValueError, r"got \(3,\)"),
        (np.ones((2, 3, 2, 2), np.float32), ValueError, r"got \(2, 3, 2, 2\)"),
    ],
)
def test_a_wrong_input_is_named(z, error, words):
    with pytest.raises(error, match=words):
        Plan(small())(z)


@pytest.mark.parametrize("name", PLANS)
def test_a_file_cut_anywhere_is_refused(name, tmp_path):
    data, path = PLANS[name](), tmp_path / "cut.fgplan"
    for size in range(len(data)):
        with pytest.raises(PlanError, match="cannot be used"):
            Plan(data[:size])
    for size in (0, 7, HEADER.size - 1, HEADER.size, 600, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(PlanError, match=r"cut\.fgplan: .*(short|cut)"):
            Plan.load(path)
    with pytest.raises(PlanError):
        Plan(data + b"\0")


@pytest.mark.parametrize("name", PLANS)
def test_a_changed_byte_is_refused(name):
    data = PLANS[name]()
    for at in range(len(data)):
        with pytest.raises(PlanError):
            Plan(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


def test_another_version_and_other_files_are_refused(tmp_path):
    for version in (1, 7):
        with pytest.raises(
            PlanError, match=f"version {version}, and this fastgen reads version 2: export the model again"
        ):
            Plan(sealed(small()[:8] + struct.pack("<I", version) + small()[12:]))
    with pytest.raises(PlanError, match="not a plan"):
        Plan(b"PK\3\4" + small()[4:])
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.fgplan")
    with pytest.raises(ValueError, match="threads must be"):
        Plan(small(), threads=0)
    assert Plan(small(), threads=10**30).threads >= 1


def test_what_this_version_does_not_read_is_named():
    def changed(at: int, number: int) -> bytes:
        data = small()
        return sealed(data[:at] + struct.pack("<q", number) + data[at + 8 :])

    precision = 48
    convolution, _ = records(small())[1]
    weight = convolution + RECORD.size + READ.size + 11 * 8  # behind the geometry
    for data, words in (
        (
            changed(precision, Precision.float16),
            "precision is float16, and this version of fastgen runs float32 and bf",
        ),
        (changed(precision, 9), "unknown precision"),
        (changed(weight + 8, Precision.int8), r"step 1 of the plan \(convolution\) has weights of int8"),
        (changed(weight + 16, 0), r"step 1 of the plan \(convolution\) has weights with scales"),
        (changed(convolution, int.from_bytes(b"attentio", "little")), "is of the unknown kind attentioion"),
        (changed(convolution, -1), "step 1 of the plan is of an unknown kind"),
    ):
        with pytest.raises(PlanError, match=words):
            Plan(data)


def test_the_measured_error_is_kept():
    plan = Plan(small())
    assert math.isnan(plan.error)
    plan.error = 1e-6
    assert plan.error == copy.deepcopy(plan).error == Plan(plan.to_bytes()).error == 1e-6
    assert Plan(encode([Input([], (3, 1, 1), 1), Output([Read(0, (3, 1, 1))], (3, 1, 1), 1)], error=0.5)).error == 0.5
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match="error must be"):
            plan.error = wrong


@pytest.mark.parametrize("wrong", (0, -1, 1.5, None))
def test_no_number_of_images_or_repeats_makes_it_crash(wrong):
    plan = Plan(small())
    for call, name in ((plan.tune, "n"), (plan.profile, "n"), (lambda repeats: plan.profile(1, repeats), "repeats")):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {wrong}"):
            call(wrong)


def records(data: bytes) -> list[tuple[int, bytes]]:
    """Where the record of each step begins, and its kind."""
    found, at = [], HEADER.size
    for _ in range(HEADER.unpack_from(data)[4]):
        kind, size, *_ = RECORD.unpack_from(data, at)
        found.append((at, kind))
        at += size
    return found


def test_the_plans_have_every_kind():
    kinds = {
        cls.kind.encode()
        for cls in vars(steps_module).values()
        if isinstance(cls, type) and issubclass(cls, Step) and cls is not Step
    }
    assert {kind.rstrip(b"\0") for data in (small(), several()) for _, kind in records(data)} == kinds


@pytest.mark.parametrize("precision", (Precision.float32, Precision.bfloat16))
@pytest.mark.parametrize("name", PLANS)
def test_no_header_or_step_makes_it_crash_even_with_the_right_checksum(name, precision):
    """Huge and odd numbers in every field, and the kinds of other steps: an error, or a plan that runs."""
    data = PLANS[name](precision)
    numbers = [0, 1, -1, 2, 3, 5, 255, 1 << 20, 1 << 28, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62) + 5, -(1 << 63)]
    end = HEADER.size + HEADER.unpack_from(data)[5]
    loaded = 0

    def check(changed: bytes) -> None:
        nonlocal loaded
        try:
            plan = Plan(sealed(changed))
        except PlanError:
            return
        loaded += 1
        if np.prod([math.prod(end) for end in (*plan.output_shapes, *(x.shape for x in plan.inputs))]) < 1 << 20:
            assert shapes(plan(*given(plan, 2))) == [(2, *shape) for shape in plan.output_shapes]

    for at in range(16, end, 8):
        for number in numbers:
            check(data[:at] + struct.pack("<q", number) + data[at + 8 :])
    kinds = {kind for each in (small(), several()) for _, kind in records(each)}
    for at, _ in records(data):
        for kind in kinds:
            check(data[:at] + kind + data[at + len(kind) :])
    choose = random.Random(0)
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(choose.randrange(1, 4)):
            struct.pack_into("<q", changed, 8 * choose.randrange(2, end // 8), choose.choice(numbers))
        check(bytes(changed))
    assert loaded


def test_without_the_native_module_one_line_says_why(tmp_path):
    (tmp_path / "a.fgplan").write_bytes(small())
    code = """
import sys
from pathlib import Path
from fastgen._build import toolchain
from fastgen.errors import FastgenError
from fastgen.runtime import Plan
toolchain.PACKAGE = Path(sys.argv[1])  # nothing was built ahead of time
try:
    Plan.load(sys.argv[1] + "/a.fgplan")
except FastgenError as error:
    print(error)
"""
    environment = {**os.environ, "FASTGEN_BUILD": "0", "FASTGEN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, timeout=60, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "building is turned off (FASTGEN_BUILD=0)\n"


def test_it_runs_without_torch(tmp_path):
    """In a process in which torch cannot be imported."""
    (tmp_path / "a.fgplan").write_bytes(small())
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import fastgen.runtime
out = fastgen.runtime.Plan.load(sys.argv[1])(np.ones((2, 3, 1, 1), np.float32))
assert out.shape == (2, 4, 4, 4) and np.isfinite(out).all()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.fgplan"], check=True, timeout=60)


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
@pytest.mark.parametrize("threads", ("1", "3"))
@pytest.mark.parametrize("precision", (Precision.float32, Precision.bfloat16))
def test_every_instruction_set_and_more_threads_than_processors(isa, threads, precision, tmp_path):
    z = np.random.default_rng(1).standard_normal((9, 3, 1, 1)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "y.npy", Plan(small())(z))
    (tmp_path / "a.fgplan").write_bytes(small(precision))
    code = """
import sys, numpy as np
from fastgen.runtime import Plan
z, y = np.load(sys.argv[1] + "/z.npy"), np.load(sys.argv[1] + "/y.npy")
plan = Plan.load(sys.argv[1] + "/a.fgplan")
assert plan.threads == int(sys.argv[2])
for _ in range(20):
    np.testing.assert_allclose(plan(z), y, rtol=0, atol=0.05 if plan.precision == "bf16" else 1e-5)
"""
    environment = {**os.environ, "FASTGEN_CPU_ISA": isa, "FASTGEN_THREADS": threads}
    subprocess.run([sys.executable, "-c", code, tmp_path, threads], check=True, timeout=60, env=environment)
