"""A walk over the options of every model with values at their edges: each is refused by name, or makes a model that
works."""

import dataclasses
import math

import pytest
import torch

from fastgen.errors import FastgenError, UsageError
from fastgen.models import create_model
from tests.models.tiny import TINY

EDGES = (
    *(0, 1, -1, 2, 3, 7, 8, 12, 16, True, False, None, "", "2", "batch", 1.0, 2.5, -0.0, math.nan, math.inf, 1e30, 1j),
    *(
        (),
        (1,),
        [2, 2],
        (0,),
        ("a", 1),
        ((2,),),
        {},
        {2},
        b"2",
        torch.tensor(2),
        2**16 + 1,
        10**9,
        2**63,
        -(2**63),
        10**400,
    ),
)


def works(model):
    """Whether training and drawing with a batch of two run and give finite numbers of the shapes that the config
    says."""
    config = model.config
    if hasattr(config, "channels_a"):
        images = torch.randn(2, config.channels_a, config.image_size, config.image_size)
        out = model(images)
        assert out.shape == (2, config.channels_b, config.image_size, config.image_size)
        assert model.translate(out, "b_to_a").shape == images.shape
        return bool(model.discriminator_a(images).isfinite().all() and model.discriminator_b(out).isfinite().all())
    shape = (2, config.channels, config.image_size, config.image_size)
    if hasattr(model, "encode"):
        out, mu, _ = model(torch.rand(shape) * 2 - 1)
        assert mu.shape == (2, config.nz) and model.sample(1).shape[1:] == shape[1:]
        return out.shape == shape and bool(out.isfinite().all())
    conditions, asked = (), {}
    if hasattr(config, "classes"):
        conditions = (torch.tensor([0, config.classes - 1]),)
    elif hasattr(config, "vocabulary"):
        asked = {"captions": config.vocabulary[0]}
        conditions = (model.text_encoder([config.vocabulary[0]] * 2),)
    out = model(model.latent(2), *conditions)
    logits = model.discriminator(out, *conditions)
    assert logits.shape == (2,) and model.sample(1, **asked).shape[1:] == shape[1:]
    return out.shape == shape and bool(logits.isfinite().all())


@pytest.mark.parametrize("name", TINY)
def test_every_option_at_its_edges(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # nothing is looked for in the hub
    model, options, *_ = TINY[name]
    made = 0
    for field in dataclasses.fields(create_model(model, **options).config):
        for value in EDGES:
            try:
                example = create_model(model, **{**options, field.name: value})
            except UsageError as error:
                assert field.name in str(error) and len(str(error)) < 300, (field.name, value, str(error))
            except FastgenError as error:
                assert field.name == "text_encoder" and f"text encoder {value!r} needs transformers" in str(error)
            else:
                assert works(example), (field.name, value)
                made += 1
    assert made > 10


@pytest.mark.parametrize("name", [None, 3, ["gan"], "", "GAN", "gan ", ("gan",), math.nan])
def test_names_of_models(name):
    with pytest.raises(UsageError, match=r"unknown model .*: .*there are: cgan, cyclegan, dcgan"):
        create_model(name)
