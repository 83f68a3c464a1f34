"""The plan without torch: what it computes, and that no file makes it crash."""

import os
import random
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from fastgen.runtime import Plan, PlanError, _file
from fastgen.runtime._file import Step, encode


def small(bfloat16: bool = False) -> bytes:
    """(3, 1, 1) -> conv_transpose, instance norm, leaky_relu -> conv + residual, batch norm's map, tanh: (2, 4, 4)."""
    generator = np.random.default_rng(0)

    def floats(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    steps = [
        Step("conv_transpose", 0, (3, 1, 1), (2, 4, 4), kernel=(4, 4), weight=floats(3, 2, 4, 4), bias=floats(2),
             norm="instance", activation="leaky_relu", negative_slope=0.2),
        Step("conv", 1, (2, 4, 4), (2, 4, 4), residual=1, kernel=(3, 3), padding=(1, 1), reflect=True, norm="affine",
             weight=floats(2, 2, 3, 3), mean=floats(2), var=floats(2) ** 2 + 1, activation="tanh"),
        Step("concat", 1, (2, 4, 4), (4, 4, 4), residual=2),
        Step("pointwise", 3, (4, 4, 4), (4, 4, 4), norm="group", num_groups=2, norm_weight=floats(4), activation="silu"),
    ]  # fmt: skip
    return encode(steps, (3, 1, 1), (4, 4, 4), bfloat16=bfloat16)


def sealed(data: bytes) -> bytes:
    """The bytes with the checksum that they should have."""
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


def test_it_computes_what_numpy_does():
    weight = np.random.default_rng(0).standard_normal((5, 3, 1, 1)).astype(np.float32)
    bias = np.arange(5, dtype=np.float32)
    data = encode([Step("conv", 0, (3, 1, 1), (5, 1, 1), weight=weight, bias=bias, activation="relu")], (3,), (5,))
    z = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    np.testing.assert_allclose(Plan(data)(z), np.maximum(z @ weight[:, :, 0, 0].T + bias, 0), rtol=1e-5, atol=1e-6)


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


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data, path = small(), tmp_path / "cut.fgplan"
    for size in range(len(data)):
        with pytest.raises(PlanError, match="cannot be used"):
            Plan(data[:size])
    for size in (0, 7, 111, 112, 600, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(PlanError, match=r"cut\.fgplan: .*(short|cut)"):
            Plan.load(path)
    with pytest.raises(PlanError):
        Plan(data + b"\0")


def test_a_changed_byte_is_refused():
    data = small()
    for at in range(len(data)):
        with pytest.raises(PlanError):
            Plan(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


def test_another_version_and_other_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="version 7, and this fastgen reads version 1"):
        Plan(sealed(small()[:8] + struct.pack("<I", 7) + small()[12:]))
    with pytest.raises(PlanError, match="not a plan"):
        Plan(b"PK\3\4" + small()[4:])
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.fgplan")
    with pytest.raises(ValueError, match="threads must be"):
        Plan(small(), threads=0)


@pytest.mark.parametrize("bfloat16", (False, True))
def test_no_header_or_step_makes_it_crash_even_with_the_right_checksum(bfloat16):
    """Huge and odd numbers in every field: an error, or a plan that runs."""
    data = small(bfloat16)
    numbers = [0, 1, -1, 2, 3, 5, 255, 1 << 20, 1 << 28, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62) + 5, -(1 << 63)]
    end = _file._HEADER.size + 4 * _file._STEP.size
    loaded = 0

    def check(changed: bytes) -> None:
        nonlocal loaded
        try:
            plan = Plan(sealed(changed))
        except PlanError:
            return
        loaded += 1
        if np.prod(plan.input_shape) * np.prod(plan.output_shape) < 1 << 20:
            out = plan(np.ones((2, *plan.input_shape), np.float32))
            assert out.shape == (2, *plan.output_shape)

    for at in range(16, end, 8):
        for number in numbers:
            check(data[:at] + struct.pack("<q", number) + data[at + 8 :])
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
from fastgen import _build
from fastgen.errors import FastgenError
from fastgen.runtime import Plan
_build.PACKAGE = Path(sys.argv[1])  # nothing was built ahead of time
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
@pytest.mark.parametrize("bfloat16", (False, True))
def test_every_instruction_set_and_more_threads_than_processors(isa, threads, bfloat16, tmp_path):
    z = np.random.default_rng(1).standard_normal((9, 3, 1, 1)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "y.npy", Plan(small())(z))
    (tmp_path / "a.fgplan").write_bytes(small(bfloat16))
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
