"""The documents' examples run, the things they name exist, and their tables agree with the code."""

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import cli, ops
from fastgen._build import native, runtime
from fastgen.cli import train
from fastgen.data import list_datasets
from fastgen.ops import _choices, _policy, _rules, _tiers
from fastgen.training.config import CONFIGS
from tests.test_imports import ANYTHING, LAYERS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
ALL = PAGES | {name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "benchmarks/NOTES.md")}
README, OPS = PAGES["README.md"], PAGES["docs/ops.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of each line that calls fastgen."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fastgen ")]


def first_cells(page: str) -> list[str]:
    """The text in backticks in the first cell of each row of a table."""
    return [name for row in re.findall(r"^\| (`[^|]*) \|", PAGES[page], re.MULTILINE) for name in code(row)]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with official checkpoints in it."""
    monkeypatch.chdir(tmp_path)
    official = fastgen.create_model("dcgan")
    torch.save(official.generator.state_dict(), "netG_epoch_24.pth")
    torch.save(official.discriminator.state_dict(), "netD_epoch_24.pth")
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder for measurements; the native code comes from the real one."""
    native.load()
    runtime.load()
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path / "cache"))
    _choices.forget()
    yield
    _choices.forget()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, folder, cache, monkeypatch):
    if "digits" in "".join(blocks(page, "python")):
        pytest.importorskip("sklearn")
    # Inductor and the steps after training are slow and have tests of their own.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("fastgen.training.run.finish_run", lambda *arguments: None)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {"__name__": page})


def test_the_four_lines_save_a_picture(folder):
    (lines,) = re.findall(r"^python -c '\n(.*?)^'", "".join(blocks("README.md", "sh")), re.DOTALL | re.MULTILINE)
    assert len(lines.splitlines()) == 4
    exec(compile(lines, "README.md", "exec"), {})
    assert (folder / "grid.png").stat().st_size > 0


def test_the_commands_of_the_readme_run(folder):
    pytest.importorskip("sklearn")
    shown = [*commands("README.md"), ["train", "dcgan", "--out", "runs/a", "--resume"]]
    assert [command[0] for command in shown] == [
        *("train", "generate", "evaluate", "export", "generate", "bench", "info", "build", "train")
    ]
    for command in shown:
        if "--steps" in command:  # a small run
            command[command.index("--steps") + 1] = "2"
            command += ["--ngf", "2", "--ndf", "2", "--nz", "4"]
        assert cli.main(command) == 0, command
    assert (folder / "grid.png").exists() and (folder / "runs" / "a" / "samples.png").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_what_the_command_line_takes(page, monkeypatch):
    """The commands are parsed, not run."""
    parsed = []

    def parse_alone(function):
        @functools.wraps(function)
        def instead(*args, **kwargs):
            parsed.append(function.__name__)

        return instead

    monkeypatch.setattr(cli, "_COMMANDS", {name: parse_alone(run) for name, run in cli._COMMANDS.items()})
    monkeypatch.setattr(cli, "run_train", lambda kind, args: parsed.append(train._parse(kind(), args)) or 0)
    for command in commands(page):
        assert cli.main(command) == 0, command
    assert len(parsed) == len(commands(page))


def test_the_readme_names_every_command_and_page():
    assert len(README.splitlines()) <= 150
    for command in cli._COMMANDS:
        assert re.search(rf"\b{command}\b", README), command
    linked = re.findall(r"\]\(([^)]+)\)", README)
    assert set(PAGES) - {"README.md"} <= set(linked)


@pytest.mark.parametrize("page", ALL)
def test_links_are_not_broken(page):
    for link in re.findall(r"\]\(([^)]+)\)", ALL[page]):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_targets_exist(page):
    named = re.findall(r"`((?:fastgen|csrc|kernels|tests|benchmarks|docs)/[\w./-]*)", PAGES[page])
    later = ("upsample_act", "fastgen/ops/choices/")  # an example; what `make gpu` writes
    assert [name for name in named if not (ROOT / name).exists() and not any(part in name for part in later)] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^    |^|`)make (\w+)", PAGES[page], re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", ALL)
def test_prose_is_no_wider_than_code(page):
    assert [line for line in ALL[page].splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_every_environment_variable_is_in_the_table():
    files = [
        file
        for folder in ("fastgen", "csrc")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".cpp", ".h")
    ]
    read = {name for file in files for name in re.findall(r'"(FASTGEN_[A-Z_]+)"', file.read_text())} - {"FASTGEN_FILE"}
    of_users = {name for name in first_cells("docs/environment.md") if name.startswith("FASTGEN_")}
    of_tests = {name for name in first_cells("CONTRIBUTING.md") if name.startswith("FASTGEN_")}
    assert of_users | of_tests == read and not of_users & of_tests


def test_the_table_of_ops_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", OPS, re.MULTILINE)
    written = {
        op: ["yes" if name in there else "no" for name in ("reference", "cpp", "triton", "cuda")]
        for op, there in _tiers.ops().items()
    }
    assert {op: cells for op, *cells in rows} == written


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md"])
def test_every_name_of_an_implementation_is_explained(page):
    words = {*ops.IMPLEMENTATIONS, "unfused", _policy.MODULES.implementation}
    (table,) = re.findall(r"^\| word \|.*\n\|---\|---\|\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    assert {word for row in table.splitlines() for word in code(row.split("|")[1])} == words


def test_signatures_are_those_of_the_code():
    (text,) = blocks("docs/ops.md", "text")
    shown = dict(re.findall(r"^(\w+)\((.*)\)$", text, re.MULTILINE))
    assert set(shown) == {"conv2d_norm_act", "conv_transpose2d_norm_act", "norm_act"}
    pairs = [cell.split("=") for cell in first_cells("docs/ops.md") if "=" in cell]
    keywords = {name: ast.literal_eval(default) for name, default in pairs}
    unused = set(keywords)
    for op, positional in shown.items():
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        first = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in first), op
        only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert only.items() <= keywords.items(), op
        unused -= set(only)
    assert not unused


def test_rules_name_headings_of_the_notes():
    headings = re.findall(r"^#+ (.*)$", ALL["benchmarks/NOTES.md"], re.MULTILINE)
    assert len(set(headings)) == len(headings)
    assert {rule.notes for rule in (*_rules.FORWARD, *_rules.WEIGHT_GRAD)} <= set(headings)


def test_tables_of_systems_and_data_are_complete():
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \| [^|]+ \| [^|`]+ \|$", README, re.MULTILINE)
    assert {name for names, _ in rows for name in code(names)} == set(CONFIGS)
    assert {name for _, names in rows for name in code(names)} == set(fastgen.list_models())
    assert set(list_datasets()) <= set(first_cells("docs/data.md"))


def test_the_table_of_imports_is_the_one_that_is_tested():
    rows = re.findall(r"^\| `fastgen/(\w+)(?:/|\.py)` \| [^|]+ \| ([^|]*)\|$", PAGES["CONTRIBUTING.md"], re.MULTILINE)
    shown = {layer: ANYTHING if "everything" in cell else set(code(cell)) - {"kernels"} for layer, cell in rows}
    assert shown == {layer: allowed for layer, allowed in LAYERS.items() if layer in shown}
    assert set(LAYERS) - set(shown) == {"__init__", "__main__", "errors"}
