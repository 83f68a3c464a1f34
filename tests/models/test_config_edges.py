"""All options of every model at their edge values: each is refused by name, or gives a model that works."""

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
    """Whether training and generating with a batch of two work and give finite numbers in the shapes of the config."""
    declared = model.capabilities
    size = (declared.image_size, declared.image_size)
    if declared.directions:
        before, after = declared.directions["a_to_b"]
        images = torch.randn(2, before, *size)
        out = model(images)
        assert out.shape == (2, after, *size)
        assert model.translate(out, "b_to_a").shape == images.shape
        return bool(model.discriminator_a(images).isfinite().all() and model.discriminator_b(out).isfinite().all())
    shape = (2, declared.channels, *size)
    if declared.encodes:
        out, mu, _ = model(torch.rand(shape) * 2 - 1)
        assert mu.shape == (2, *declared.latent_shape) and model.sample(1).shape[1:] == shape[1:]
        return out.shape == shape and bool(out.isfinite().all())
    values = {
        condition.name: [0, condition.classes - 1] if condition.classes else [model.config.vocabulary[0]] * 2
        for condition in declared.conditions
    }
    values |= {"labels": torch.tensor(values["labels"])} if "labels" in values else {}
    encoded = [condition.encode(values[condition.name]) for condition in declared.conditions]
    out = model(model.latent(2), *encoded)
    logits = model.discriminator(out, *encoded)
    assert logits.shape == (2,) and model.sample(2, **values).shape == shape
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
    with pytest.raises(UsageError, match=r"unknown model .*: .*choose from: cgan, cyclegan, dcgan"):
        create_model(name)
