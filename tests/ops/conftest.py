import pytest

from fastgen._build import native
from fastgen.ops import _choices, _policy, _processor
from fastgen.ops._question import Choice
from tests.cases import PROCESSORS, TESTED


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Separate cache and shipped files for the test, which may read them, and the rules of one fixed processor."""
    assert native.load() is None  # from the real cache
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_choices, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("FASTGEN_CHOICES")
    monkeypatch.setattr(_processor, "here", lambda: PROCESSORS["avx512"])  # whatever the real processor is
    _choices.forget()
    yield tmp_path
    _choices.forget()


@pytest.fixture
def fastgen_kernels(monkeypatch):
    """The backward of a convolution runs fastgen's kernels even where they are slower."""
    monkeypatch.setattr(_policy, "_fastest", lambda *_: Choice(TESTED))
