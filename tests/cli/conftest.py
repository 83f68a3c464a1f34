"""Tiny runs of every system, and commands that must fail."""

import dataclasses

import pytest

from fastgen.cli import main
from fastgen.training import CONFIGS, train

GAN = {"batch_size": 4, "nz": 4}
DCGAN = {**GAN, "ngf": 2, "ndf": 2}
TINY = {
    "gan": {**GAN, "width": 4, "image_size": 8},
    "dcgan": DCGAN,
    "cgan": {**DCGAN, "embedding": 4},
    "text2image": {**DCGAN, "text_width": 8, "text_layers": 1, "caption_width": 4},
    "vae": {"batch_size": 4, "image_size": 16, "nz": 4, "width": 2},
    "cyclegan": {"batch_size": 1, "image_size": 16, "ngf": 2, "ndf": 2, "blocks": 1, "pool_size": 2},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(system) is the folder of a run of one step, for tests that measure and generate, but do not train."""
    root = tmp_path_factory.mktemp("runs")

    def folder(system):
        if not (root / system).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastgen.training.run.finish_run", lambda *arguments: None)  # has tests of its own
                train(dataclasses.replace(CONFIGS[system](), steps=1, **TINY[system]), root / system)
        return root / system

    return folder


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with a code and one line on stderr; returns the line."""

    def run(code, *arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        errors = capsys.readouterr().err
        assert errors.startswith("fastgen: error: ") and errors.count("\n") == 1, errors
        return errors

    return run
