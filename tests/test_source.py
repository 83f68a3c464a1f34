"""Rules for the source itself: short files, named tolerances, meaningful module names."""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import ROOT

MOST_LINES = 400
CODE = sorted(
    file
    for folder in ("fastgen", "csrc", "kernels", "tests", "benchmarks")
    for file in (ROOT / folder).rglob("*.*")
    if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)
# Files that are longer, each with its reason.
LONG: dict[str, str] = {}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_files_fit_in_a_head():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in CODE}
    longer = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert {name: lines for name, lines in longer.items() if name not in LONG} == {}, "split them"
    assert LONG.keys() - longer.keys() == set(), "they need no exception any more"


def test_no_file_is_named_common():
    found = {name_of(file) for file in CODE if file.stem.strip("_") in ("common", "helpers", "misc", "util", "utils")}
    assert found == set()


def unnamed_tolerances(source: str) -> Iterator[int]:
    """The lines of rtol=, atol= and units() with numbers, including programs in strings, except definitions of
    constants with a comment."""
    tree, lines = ast.parse(source), source.splitlines()
    constants = [
        node for node in tree.body if isinstance(node, ast.Assign) and "# " in "".join(lines[: node.lineno][-2:])
    ]
    named = {part for constant in constants for part in ast.walk(constant)}
    for node in ast.walk(tree):
        values = []
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg in ("rtol", "atol")]
            if getattr(node.func, "id", None) == "units" and node not in named:
                yield node.lineno
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True) if node not in named else ()
            values = [value for key, value in pairs if getattr(key, "value", None) in ("rtol", "atol")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "tol" in node.value:
            with contextlib.suppress(SyntaxError):  # not a program
                yield from (node.lineno for _ in unnamed_tolerances(node.value))
        for value in values:
            if any(isinstance(part, ast.Constant) and part.value for part in ast.walk(value)):
                yield value.lineno


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("close(a, b, rtol=0, atol=0)", 0),
        ("close(a, b, rtol=1e-3, atol=scale * 2)", 2),
        ("close(a, b, **{'rtol': 1e-3, 'atol': REACHED})", 1),
        ("code = 'close(a, b, rtol=1e-3)'", 1),
        ("close(a, b, **units(torch.float32, 1, 1))", 1),
        ("CLOSE = units(torch.float32, 1, 1)", 1),
        ("CLOSE = units(torch.float32, 1, 1)  # sums of few terms", 0),
        ("# Sums of few terms.\nCLOSE = units(torch.float32, 1, 1)", 0),
        ("CLOSE = {'rtol': 1e-3, 'atol': 0}", 1),
        ("CLOSE = {'rtol': 1e-3, 'atol': 0}  # sums of few terms", 0),
    ],
)
def test_unnamed_tolerances_are_found(source, count):
    assert len(list(unnamed_tolerances(source))) == count


def test_tolerances_have_names_and_reasons():
    files = [file for file in CODE if file.suffix == ".py" and file.is_relative_to(ROOT / "tests")]
    found = {name_of(file): list(unnamed_tolerances(file.read_text())) for file in files}
    found.pop("tests/test_source.py")  # the examples above
    assert {name: lines for name, lines in found.items() if lines} == {}
