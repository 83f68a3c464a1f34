"""`fastgen export` of every system with every choice of its settings: a plan, or one line that says why there is
none."""

import dataclasses
import json
import typing
from types import SimpleNamespace

import pytest
import torch

import fastgen
from fastgen.data import DomainPair
from fastgen.errors import UsageError
from fastgen.models.registry import _MODELS
from fastgen.tasks import Drawing
from fastgen.training.config import CONFIGS
from fastgen.training.recipes import RECIPES
from tests.support.tolerance import FLOAT32

SMALL = {
    "nz": 3, "width": 4, "ngf": 2, "ndf": 2, "embedding": 2, "caption_width": 4, "text_width": 4, "text_layers": 1,
    "blocks": 1, "unet_depth": 2,
}  # fmt: skip


def choices(config):
    """The config's defaults at a small size, and each other choice of every setting with choices."""
    hints = typing.get_type_hints(config)
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    small = {name: value for name, value in SMALL.items() if name in fields and hints[name] is int}
    yield small
    for name, default in fields.items():
        is_literal = typing.get_origin(hints[name]) is typing.Literal
        for option in typing.get_args(hints[name]) if is_literal else (True, False) if hints[name] is bool else ():
            if option != default:
                yield small | {name: option}


def trained(system, options, channels):
    """The name and options of the model that a run of the system creates for data with this many channels."""
    images = SimpleNamespace(channels=channels, labels=torch.zeros(2), classes=["a", "b", "c"], captions=["a red dot"])
    data = DomainPair("pair", images, images) if system == "cyclegan" else images
    recipe = object.__new__(RECIPES[system])
    recipe.config, recipe.data = CONFIGS[system](**options), data
    model_options = recipe.make_model_options()
    return recipe.model_name, model_options


def cases():
    seen = {}
    for system, config in CONFIGS.items():
        for options in choices(config):
            for channels in (1, 3) if not seen or options.keys() <= SMALL.keys() else (1,):
                name, made = trained(system, options, channels)
                seen[name, json.dumps(made, default=list)] = name, made
    for name, (_, config) in _MODELS.items():
        for options in choices(config):
            options |= {"vocabulary": ["a", "red", "dot"]} if name == "text2image" else {}
            options |= {"widths": [2, 3]} if name == "vae" else {}
            seen[name, json.dumps(options)] = name, options
    return list(seen.values())


REFUSED = {
    "cyclegan": "a CycleGAN does not draw from noise",
    "text2image": "a Text2Image draws with captions, and not with noise and labels alone",
}


def test_every_system_exports_or_says_why_not():
    plans = set()
    for name, options in cases():
        torch.manual_seed(0)
        model = fastgen.create_model(name, **options).eval()
        if name in REFUSED:
            with pytest.raises(UsageError, match=REFUSED[name]):
                Drawing(model)
            continue
        drawing = Drawing(model)
        engine = fastgen.Engine(drawing, drawing.example, impl="cpp")
        z = model.latent(3)
        inputs = (z, *(torch.arange(3) for _ in model.capabilities.conditions))
        torch.testing.assert_close(engine(*inputs), model.generate(*inputs).detach(), **FLOAT32)
        plans.add(name)
    assert plans | REFUSED.keys() == set(fastgen.list_models())
