"""No bytes of a plan file make the reader crash."""

import copy
import math
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from fastgen.runtime import Plan, PlanError
from fastgen.runtime import _steps as steps_module
from fastgen.runtime._file import HEADER, READ, RECORD, encode
from fastgen.runtime._steps import Input, Norm, Output, Precision, Read, Step
from tests.runtime.plans import PLANS, example_inputs, records, sealed, several, shapes, small

ROOT = Path(__file__).parents[2]


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


def test_content_that_this_version_cannot_read_is_named():
    def changed(at: int, number: int) -> bytes:
        data = small()
        return sealed(data[:at] + struct.pack("<q", number) + data[at + 8 :])

    precision = 48
    convolution, _ = records(small())[1]
    weight = convolution + RECORD.size + READ.size + 11 * 8  # after the geometry
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


def test_the_enumerations_are_those_of_cpp():
    """Those of activations are compared in tests/test_activations.py."""

    def names(header: str, name: str) -> list[str]:
        found = re.search(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", (ROOT / "csrc" / header).read_text())
        assert found, name
        return re.findall(r"\w+", found[1])

    assert [each.name for each in Norm] == names("plan/epilogue.h", "Norm")
    assert [each.name for each in Precision] == names("plan/format.h", "Precision")


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
            assert shapes(plan(*example_inputs(plan, 2))) == [(2, *shape) for shape in plan.output_shapes]

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
