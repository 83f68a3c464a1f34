"""What the README shows runs."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import cli
from fastgen.ops._dispatch import _WRITTEN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, with official checkpoints in it."""
    monkeypatch.chdir(tmp_path)
    official = fastgen.create_model("dcgan")
    torch.save(official.generator.state_dict(), "netG_epoch_24.pth")
    torch.save(official.discriminator.state_dict(), "netD_epoch_24.pth")
    return tmp_path


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block, folder, monkeypatch):
    # Inductor has tests of its own and is slow.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    exec(compile(block, "README.md", "exec"), {})


def test_the_four_lines_save_a_picture(folder):
    (lines,) = re.findall(r"^python -c '\n(.*?)^'", SHELL, re.DOTALL | re.MULTILINE)
    assert len(lines.splitlines()) == 4
    exec(compile(lines, "README.md", "exec"), {})
    assert (folder / "grid.png").stat().st_size > 0


def test_the_commands_run(folder, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    commands = [shlex.split(line, comments=True)[1:] for line in SHELL.splitlines() if line.startswith("fastgen ")]
    commands.append(["train", "dcgan", "--out", "runs/a", "--resume"])
    assert [command[0] for command in commands] == [
        *("train", "generate", "evaluate", "info", "build", "export", "generate", "bench", "train")
    ]
    for command in commands:
        if "--steps" in command:  # a small run
            command[command.index("--steps") + 1] = "2"
            command += ["--ngf", "2", "--ndf", "2", "--nz", "4"]
        assert cli.main(command) == 0, command
    assert (folder / "grid.png").exists() and (folder / "runs" / "a" / "samples.png").exists()


def test_files_and_targets_it_names_are_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE)) <= set(targets)


def test_every_environment_variable_is_in_the_table():
    files = [
        file
        for folder in ("fastgen", "csrc")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".cpp", ".h")
    ]
    read = {name for file in files for name in re.findall(r'"(FASTGEN_[A-Z_]+)"', file.read_text())} - {"FASTGEN_FILE"}
    assert set(re.findall(r"^\| `(FASTGEN_\w+)` \|", README, re.MULTILINE)) == read


def test_the_table_of_ops_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", README, re.MULTILINE)
    written = {
        op: ["yes" if name in there else "no" for name in ("reference", "cpp", "triton", "cuda")]
        for op, there in _WRITTEN.items()
    }
    assert {op: cells for op, *cells in rows} == written
