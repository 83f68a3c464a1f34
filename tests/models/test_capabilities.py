"""Every model fulfils its declaration, and commands, tasks and evaluation need nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastgen import tasks
from fastgen.data import ImageDataset
from fastgen.errors import DataError, UsageError
from fastgen.models import Capabilities, Condition, capabilities, create_model
from fastgen.models.registry import _MODELS
from fastgen.training import evaluation
from tests.models.tiny import TINY, make


def values_of(condition, n):
    """Values of a condition with which a model can draw n images."""
    return torch.arange(n) % condition.classes if condition.classes else ["a handwritten two"] * n


def test_every_model_declares():
    assert {name for name, *_ in TINY.values()} == set(_MODELS)
    for name, (model, _) in _MODELS.items():
        assert isinstance(vars(model).get("capabilities", getattr(model, "capabilities", None)), property), name


@pytest.mark.parametrize("name", TINY)
def test_declarations_agree_with_the_methods(name):
    model = make(name)
    declared = model.capabilities
    assert capabilities(model) == declared
    methods = {"sample": declared.draws, "latent": declared.latent_shape is not None, "encode": declared.encodes}
    methods["translate"] = bool(declared.directions)
    assert {method: hasattr(model, method) for method in methods} == methods
    assert getattr(model, "discriminator", None) is declared.discriminator
    size, n = declared.image_size, 3
    encoded = [condition.encode(values_of(condition, n)) for condition in declared.conditions]
    for condition, value in zip(declared.conditions, encoded, strict=True):
        example = condition.example(n)
        assert example.shape == value.shape and example.dtype == value.dtype
        assert condition.classes is None or value.max() < condition.classes
    if declared.draws:
        values = {condition.name: values_of(condition, n) for condition in declared.conditions}
        assert model.sample(n, **values).shape == (n, declared.channels, size, size)
    if declared.latent_shape is not None:
        z = model.latent(n)
        assert z.shape[1:] == declared.latent_shape
        images = model.generate(z, *encoded)
        assert images.shape == (n, declared.channels, size, size)
        if declared.discriminator is not None:
            assert declared.discriminator(images, *encoded).shape == (n,)
    if declared.encodes:
        mu, logvar = model.encode(torch.zeros(n, declared.channels, size, size))
        assert mu.shape == logvar.shape == (n, *declared.latent_shape)
        assert model.decode(mu).shape == (n, declared.channels, size, size)
    least = declared.least_size
    for direction, (before, after) in declared.directions.items():
        for height, width in ((size, size), (least, least + declared.size_multiple)):
            translated = model.translate(torch.zeros(2, before, height, width), direction)
            assert translated.shape == (2, after, height, width)
        for wrong in (least - declared.size_multiple, least + declared.size_multiple // 2):
            if wrong > 0:
                with pytest.raises(UsageError):
                    model.translate(torch.zeros(1, before, wrong, wrong), direction)


@pytest.mark.parametrize("name", TINY)
def test_example_inputs_are_those_of_a_training_step(name):
    model = make(name)
    examples = model.example_inputs(2)
    run = set()
    for part, inputs in examples.items():
        assert all(len(tensor) == 2 for tensor in inputs)
        output = model.get_submodule(part)(*inputs)
        assert len(output[0] if isinstance(output, tuple) else output) == 2
        run |= set(model.get_submodule(part).parameters())
    encoders = [c.encode for c in model.capabilities.conditions if isinstance(c.encode, nn.Module)]
    run |= {parameter for encoder in encoders for parameter in encoder.parameters()}
    assert run == set(model.parameters()), "no network is left out"


class Tilted(nn.Module):
    """A model with a condition that neither fastgen nor any data set knows."""

    config = None

    @property
    def capabilities(self):
        tilts = Condition("tilts", width=2, encode=lambda tilts: torch.tensor(tilts).repeat(2, 1).T)
        return Capabilities(4, 1, draws=True, latent_shape=(16,), conditions=(tilts,))

    def latent(self, n, *, generator=None):
        return torch.randn(n, 16, generator=generator)

    def generate(self, z, tilts):
        return z.view(-1, 1, 4, 4) + tilts.sum(1).view(-1, 1, 1, 1)

    def sample(self, n, *, generator=None, tilts):
        return self.generate(self.latent(n, generator=generator), self.capabilities.conditions[0].encode(tilts))


def test_a_new_condition_needs_no_other_code():
    model = Tilted()
    for options, message in (({"label": 1}, "draws without classes"), ({"text": "a"}, "draws without captions")):
        with pytest.raises(UsageError, match=message):
            tasks.conditions(model, 2, **options)
    with pytest.raises(UsageError, match="a Tilted draws with tilts, and not with noise and labels alone"):
        tasks.Drawing(model)
    with pytest.raises(UsageError, match="this Tilted draws with tilts"):
        tasks.interpolate(model, 4)
    data = ImageDataset("data", torch.zeros(5, 1, 4, 4))
    with pytest.raises(DataError, match="the model draws with tilts, and data has none"):
        evaluation.sample_like(model, data, 3, 0)


@pytest.mark.parametrize("name", ["cgan", "text2image", "vae"])
def test_samples_for_evaluation_carry_their_conditions(name):
    model = make(name)
    classes = ("no", "one", "two")
    data = ImageDataset("data", torch.zeros(3, 1, 32, 32), torch.tensor([2, 1, 2]), classes, ["two", "one", "a two"])
    batch = evaluation.sample_like(model, data, 12, 0)
    assert len(batch) == 12
    assert (batch.captions is not None) == (name == "text2image")
    if name == "text2image":
        assert all(classes[label] in text for label, text in zip(batch.labels.tolist(), batch.captions, strict=True))
    else:
        assert (batch.labels is None) == (name == "vae")
    assert name != "cgan" or batch.labels.tolist() == [*range(10), 0, 1]
    if name != "vae":
        assert isinstance(evaluation._judged(model, batch), float)


class Foreign:
    """A third-party model without a declaration."""

    def latent(self, n, *, generator=None):
        return torch.zeros(n, 3)

    def generate(self, z, labels, style):
        return z


def test_a_model_without_a_declaration_is_judged_by_its_methods():
    declared = capabilities(Foreign())
    assert declared.latent_shape == (3,) and not declared.draws and not declared.encodes and not declared.directions
    assert [condition.name for condition in declared.conditions] == ["labels", "style"]
    assert declared.conditions[0].classes == 2**31
    assert capabilities(object()) == Capabilities()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("cgan", "concatenation", "discriminator_conditioning"), ("text2image", 4, "caption_width")],
)
def test_options_have_their_old_names_too(name, old, new):
    """Checkpoints of older versions say `condition`."""
    model = create_model(name, condition=old)
    assert getattr(model.config, new) == old
    assert model.config == replace(create_model(name).config, **{new: old})
    with pytest.raises(UsageError, match=f"unknown option of model {name} 'condition'"):
        create_model(name, **{"condition": old, new: old})
