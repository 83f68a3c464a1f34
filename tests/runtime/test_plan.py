"""The plan without torch computes the right values."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastgen.runtime import Plan
from fastgen.runtime._file import encode
from fastgen.runtime._steps import (
    Activation,
    Convolution,
    Epilogue,
    Geometry,
    Input,
    Output,
    Precision,
    Read,
)
from tests.runtime.plans import several, shapes, small

SUMS = {"rtol": 1e-5, "atol": 1e-6}  # sums of a few float32 products, in a different order
# A plan with another instruction set: values up to about 4, of which bfloat16 rounds a few the other way.
OTHER_CODE = {Precision.float32: 1e-5, Precision.bfloat16: 0.05}


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
    np.testing.assert_allclose(Plan(data)(z), np.maximum(z @ weight[:, :, 0, 0].T + bias, 0), **SUMS)


def test_several_inputs_and_outputs():
    plan = Plan(several())
    assert [declared.classes for declared in plan.inputs] == [None, 5, None]
    assert plan.output_shapes == ((16,), (2, 8, 8), ())
    rng = np.random.default_rng(1)
    x, labels, shift = rng.random((9, 3, 4, 4), np.float32), rng.integers(0, 5, 9), rng.random((9, 2, 1, 1), np.float32)
    whole = plan(x, labels, shift)
    assert shapes(whole) == [(9, 16), (9, 2, 8, 8), (9,)]
    table = np.random.default_rng(0).random((5, 16), np.float32)
    np.testing.assert_array_equal(whole[0], table[labels])
    np.testing.assert_allclose(whole[2], whole[1][:, 0].mean((1, 2)), **SUMS)
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
        ((x, labels[:4], shift), ValueError, r"inputs\[1\] must have 9 images as inputs\[0\] has, got shape \(4,\)"),
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
    np.testing.assert_allclose(np.concatenate([Plan(data)(z[i : i + 5]) for i in range(0, 37, 5)]), whole, **SUMS)
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
        subprocess.run([sys.executable, "-c", code, path], check=True, timeout=600)
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


@pytest.mark.parametrize("wrong", (0, -1, 1.5, None))
def test_no_number_of_images_or_repeats_makes_it_crash(wrong):
    plan = Plan(small())
    for call, name in ((plan.tune, "n"), (plan.profile, "n"), (lambda repeats: plan.profile(1, repeats), "repeats")):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {wrong}"):
            call(wrong)


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
        [sys.executable, "-c", code, tmp_path], check=True, timeout=600, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "building is turned off (FASTGEN_BUILD=0)\n"


def test_it_runs_without_torch(tmp_path):
    """A process in which torch cannot be imported runs the plan."""
    (tmp_path / "a.fgplan").write_bytes(small())
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import fastgen.runtime
out = fastgen.runtime.Plan.load(sys.argv[1])(np.ones((2, 3, 1, 1), np.float32))
assert out.shape == (2, 4, 4, 4) and np.isfinite(out).all()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.fgplan"], check=True, timeout=600)


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
near = float(sys.argv[3])
for _ in range(20):
    np.testing.assert_allclose(plan(z), y, rtol=0, atol=near)
"""
    environment = {**os.environ, "FASTGEN_CPU_ISA": isa, "FASTGEN_THREADS": threads}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path, threads, str(OTHER_CODE[precision])], check=True, env=environment
    )
