"""Every option of every system and command, at and beyond its edges: it works, or one line says why it does not.

The options are read from the settings' classes and the commands' signatures, so that new ones are covered too.
"""

import dataclasses
import functools
import inspect
import os
import shutil
import types
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image
from tyro import conf

pytest.importorskip("sklearn")

import fastgen.data
from fastgen import cli
from fastgen.cli import main
from fastgen.errors import FastgenError, UsageError
from fastgen.metrics import train_classifier
from fastgen.training import CONFIGS, loop, run, train
from fastgen.training.recipes import gan

NUMBERS = [0, 1, 2, -1, 10**30]
EDGES = {
    int: NUMBERS,
    float: [0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")],
    str: ["", "x", "."],
    bool: [True, False],
}
GAN = {"nz": 2, "ngf": 2, "ndf": 2}
TINY = {
    "gan": {"nz": 2, "width": 4, "image_size": 8},
    "vae": {"nz": 2, "width": 2, "image_size": 8},
    "cgan": {**GAN, "embedding": 2},
    "text2image": {**GAN, "text_width": 4, "text_layers": 1, "caption_width": 2},
    "cyclegan": {"ngf": 2, "ndf": 2, "image_size": 16, "unet_depth": 2, "blocks": 1, "pool_size": 2},
}  # fmt: skip


def edges(annotation):
    """Values of a type at and beyond its edges."""
    if typing.get_origin(annotation) is typing.Annotated:
        return edges(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return edges(typing.get_args(annotation)[0])
    return EDGES[annotation]


@functools.cache
def small(name, image_size, *, strict=False):
    """Nine images of a data set, or of each domain."""

    def some(data):
        labels, captions = (None if values is None else values[:9] for values in (data.labels, data.captions))
        return dataclasses.replace(data, images=data.images[:9], labels=labels, captions=captions)

    data = fastgen.data.load_dataset(name, image_size, strict=strict)
    if isinstance(data, fastgen.data.DomainPair):
        return dataclasses.replace(data, a=some(data.a), b=some(data.b))
    return some(data)


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
    """Small data and no waiting for the disk. The steps after training have their own tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(loop, "load_dataset", small)
        patch.setattr(run, "finish_run", lambda *arguments: None)
        patch.setattr(loop, "_GRID", 4)
        patch.setattr(gan, "_CALIBRATION", 8)
        yield
    torch.set_num_threads(threads)


def settings_at_edges(system):
    """Tiny settings with one option at its edge and a batch of one image; refused settings are left out."""
    kind = CONFIGS[system]
    hints, declared = typing.get_type_hints(kind), {*vars(kind)["__annotations__"]}
    tiny = TINY.get(system, GAN) | {"steps": 1, "batch_size": 1}
    for field in dataclasses.fields(kind):
        if system != "gan" and field.name not in declared | {"batch_size"}:
            continue  # settings of all systems are tested once
        for value in edges(hints[field.name]):
            try:
                yield field.name, value, kind(**(tiny | {field.name: value}))
            except UsageError as error:
                assert field.name in str(error) or "batch_size" in str(error)


@pytest.mark.parametrize("system", CONFIGS)
def test_training_with_settings_at_their_edges(system, tmp_path):
    done = 0
    for number, (name, value, config) in enumerate(settings_at_edges(system)):
        try:
            train(config, tmp_path / str(number))
            done += 1
        except (UsageError, FastgenError, OSError):
            pass  # one line on the command line
        except Exception as error:
            raise AssertionError(f"{system} with {name} {value!r}: {type(error).__name__}: {error}") from error
    assert done > 1


def check(capsys, arguments):
    """Runs a command, which must succeed or say in one line why it cannot; returns the exit code."""
    arguments = [str(argument) for argument in arguments]
    try:
        code = main(arguments)
    except SystemExit as exit:  # the parser's own message, for values not of the option's type
        code = exit.code
        assert code == 2, arguments
        return code
    except Exception as error:
        raise AssertionError(f"{' '.join(arguments)}: {type(error).__name__}: {error}") from error
    errors = capsys.readouterr().err.splitlines()
    messages = [line for line in errors if line.startswith("fastgen: error: ")]
    assert (code in (0, 1, 2) and len(messages) == bool(code) and errors[-1:] == messages) or not code, (
        arguments,
        code,
        errors,
    )
    return code


@pytest.fixture(scope="module")
def examples(quick, trained, tmp_path_factory):
    """Paths by name: runs of four systems, a plan, pictures, a mask, an empty folder and a file of text."""
    root = tmp_path_factory.mktemp("examples")
    for system in ("gan", "vae", "cgan", "cyclegan"):
        shutil.copytree(trained(system), root / system)
    (root / "pictures").mkdir()
    for name, size in (("thin", (1, 40)), ("wide", (40, 19))):
        Image.new("L", size, 99).save(root / "pictures" / f"{name}.png")
    Image.linear_gradient("L").save(root / "mask.png")
    (root / "empty").mkdir()
    (root / "text").write_text("no picture")
    assert main(["export", str(root / "vae"), "--plan", str(root / "plan")]) == 0
    return root


def test_training_with_paths_at_their_edges(examples, capsys, monkeypatch):
    monkeypatch.setattr(loop, "load_dataset", fastgen.data.load_dataset)
    base = ["train", "gan", "--steps", 1, "--batch-size", 1]
    for path in ("", "nothing", "no/thing", *(examples / name for name in ("empty", "text", "pictures", "vae"))):
        assert check(capsys, [*base, "--out", "a", "--data", path]) in (1, 2)
        if path != "no/thing":
            check(capsys, [*base, "--out", path, "--resume"])
            check(capsys, [*base, "--out", path, "--data", "colour-to-grey"])
    assert check(capsys, [*base[:3], "nan", "--out", "a"]) == check(capsys, [*base, "--lr", "nan", "--out", "a"]) == 2


COMMANDS = {  # arguments that work; the name of a file in `examples` stands for its path
    "generate": ["cgan", "--n", "2", "--out", "a.png"],
    "reconstruct": ["vae", "pictures", "--out", "out"],
    "denoise": ["vae", "pictures", "--out", "out", "--steps", "1"],
    "inpaint": ["vae", "pictures", "--mask", "mask.png", "--out", "out", "--steps", "1"],
    "upscale": ["vae", "pictures", "--out", "out", "--factor", "8", "--steps", "1"],
    "translate": ["cyclegan", "pictures", "--out", "out"],
    "export": ["vae", "--plan", "b"],
    "bench": ["latency", "plan", "--seconds", "0.01"],
    "tune": ["gan", "--seconds", "0.01", "--batch", "1"],
    "evaluate": ["cgan", "--n", "12"],
    "info": ["--explain", "vae_mlp", "--batch", "2"],
    "build": None,  # compiles
}


def test_every_command_is_covered():
    assert set(COMMANDS) == set(cli._COMMANDS)


@pytest.mark.parametrize("command", [name for name, base in COMMANDS.items() if base is not None])
def test_commands_with_options_at_their_edges(command, examples, capsys, monkeypatch):
    monkeypatch.setattr("fastgen.training.evaluation.load_dataset", held_small)
    monkeypatch.setattr("fastgen.training.evaluation.train_classifier", functools.partial(train_classifier, steps=1))
    monkeypatch.setattr("fastgen.training.evaluation.classifier_for", lambda name: None)
    base = [str(examples / part) if (examples / part).exists() else part for part in COMMANDS[command]]
    assert check(capsys, [command, *base]) == 0
    hints = typing.get_type_hints(cli._COMMANDS[command], include_extras=True)
    position = 0
    for name in inspect.signature(cli._COMMANDS[command]).parameters:
        positional = conf.Positional in typing.get_args(hints[name])
        paths = ["", "nothing", examples / "empty", examples / "text", examples / "pictures"]
        annotation = typing.get_args(hints[name])[0] if positional else hints[name]
        for value in paths if annotation is Path else edges(annotation):
            if positional:
                check(capsys, [command, *base[:position], value, *base[position + 1 :]])
            elif isinstance(value, bool):
                check(capsys, [command, *base, f"--{'' if value else 'no-'}{name.replace('_', '-')}"])
            else:
                flag = "--class" if name == "label" else "--" + name.replace("_", "-")
                check(capsys, [command, *base, flag, value])
        position += positional


def held_small(name, image_size, *, split="train", strict=False):
    data = fastgen.data.load_dataset(name, image_size, split=split)
    return dataclasses.replace(data, images=data.images[:40], labels=data.labels[:40], captions=None)
