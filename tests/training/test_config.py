"""Settings: which are refused, and those that older versions saved."""

import dataclasses
import inspect
import json
import re

import pytest

pytest.importorskip("sklearn")

from fastgen.cli import main
from fastgen.errors import UsageError
from fastgen.training import CONFIGS, DCGANTraining, load_model, train
from fastgen.training.config import config_from_json
from fastgen.training.recipes import RECIPES
from fastgen.training.run import read_config

GAN = {"steps": 1, "batch_size": 2, "nz": 2, "ngf": 2, "ndf": 2}


def test_every_system_has_a_recipe():
    assert CONFIGS.keys() == RECIPES.keys()
    for name, config in CONFIGS.items():
        assert config_from_json(config().to_json()) == config() and config.system == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and 1000000000, not 0"),
        ({"batch_size": 10**12}, "batch_size must be between 1 and 65536, not 10"),
        ({"ngf": 10**6}, "ngf must be between 1 and 8192"),
        ({"lr": 10**400}, "lr must be a number"),
        ({"seed": -1}, "seed must be"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"beta1": 1.0}, "beta1 must be"),
        ({"image_size": 33}, "image_size must be one of 32, 64, 128, not 33"),
        ({"batch_size": 2.5}, "batch_size must be an integer, not 2.5"),
        ({"augment": "colour"}, "unknown augmentation 'colour': did you mean color"),
        ({"clip_grad": -1.0}, "clip_grad must be between 0 and"),
        ({"lr_decay_from": 2.0}, "lr_decay_from must be between 0 and 1"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(UsageError, match=message):
        DCGANTraining(**options)


@pytest.mark.parametrize("system", ["wgan", "wgan_gp", "lsgan"])
def test_an_option_with_one_choice_is_not_shown(system, capsys):
    with pytest.raises(SystemExit):
        main(["train", system, "--help"])
    page = capsys.readouterr().out
    assert "--loss" not in page and "--d-steps" in page
    assert config_from_json({"system": system, "loss": CONFIGS[system]().loss}) == CONFIGS[system]()


@pytest.mark.parametrize("system", CONFIGS)
def test_every_setting_has_a_description(system):
    """The description is in its class or, if that only changes the default, in a base class."""
    sources = "".join(inspect.getsource(kind) for kind in CONFIGS[system].__mro__[:-1])
    for field in dataclasses.fields(CONFIGS[system]):
        assert re.search(rf'^    {field.name}: .*\n    """\w', sources, re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("system", "options", "name", "old"),
    [
        ("cgan", {"embedding": 2}, "discriminator_conditioning", "concatenation"),
        ("text2image", {"text_width": 4, "text_layers": 1}, "caption_width", 2),
    ],
)
def test_runs_of_older_versions(system, options, name, old, tmp_path, monkeypatch, capsys):
    """Their `condition` is still read, by name and on the command line, and such a run can generate images and be
    resumed."""
    monkeypatch.setattr("fastgen.training.run.finish_run", lambda *arguments: None)
    config = CONFIGS[system](**GAN, **options, **{name: old})
    train(config, tmp_path / "run")
    description = tmp_path / "run" / "checkpoint.json"
    meta = json.loads(description.read_text())
    for saved in (meta["config"], meta["model"]["options"]):
        saved["condition"] = saved.pop(name)
    description.write_text(json.dumps(meta))
    assert read_config(tmp_path / "run") == config
    assert getattr(load_model(tmp_path / "run").config, name) == old
    command = ["train", system, "--out", str(tmp_path / "run"), "--resume", "--steps", "2"]
    assert main([*command, "--condition", str(old)]) == 0
    assert name in json.loads(description.read_text())["config"]
    assert main([*command, f"--condition={'projection' if system == 'cgan' else 3}"]) == 2
    assert f"{name} of a run cannot change" in capsys.readouterr().err
