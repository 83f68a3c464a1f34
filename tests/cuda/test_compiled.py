"""Each .cu compiled for GPUs that need not be present: no warnings, spills or stack, and no fewer resident blocks than
recorded."""

import json

import pytest

from fastgen._build import cuda
from tests.cuda import compiled

SOURCES = [source for source in cuda.library.sources() if source.suffix == ".cu"]


@pytest.mark.skipif(compiled.nvcc() is None, reason="no nvcc: the CUDA kernels cannot be compiled for a GPU here")
@pytest.mark.parametrize("architecture", compiled.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_resources(source, architecture):
    actual = compiled.resources(source, architecture)
    assert {name: kernel["local"] for name, kernel in actual.items() if kernel["local"]} == {}
    recorded = json.loads(compiled.RECORDED.read_text())
    if recorded["nvcc"] != (version := cuda.nvcc_release(compiled.nvcc())):
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, here is {version}: registers are not compared")
    expected = recorded[architecture][source.stem]
    assert actual.keys() == expected.keys(), "run python -m tests.cuda.compiled"
    pairs = {name: (expected[name], kernel) for name, kernel in actual.items()}
    worse = {name: pair for name, pair in pairs.items() if pair[1]["blocks"] < pair[0]["blocks"]}
    assert not worse, f"fewer blocks of these kernels run at a time than recorded: {worse}"
