import pytest
import torch
from torch import nn

import fastgen
from fastgen.errors import UsageError
from fastgen.models import DCGAN, DCGANConfig, create_model, list_models, register_model
from tests.support.tolerance import FLOAT32


def official_generator(nz=100, ngf=64, nc=3):
    """netG of pytorch/examples dcgan/main.py, from its layer table."""
    layers = [nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False)]
    for width, next_width in ((8, 4), (4, 2), (2, 1)):
        layers += [nn.BatchNorm2d(ngf * width), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(ngf * width, ngf * next_width, 4, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(ngf), nn.ReLU(True), nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.ModuleDict({"main": nn.Sequential(*layers)})


def official_discriminator(ndf=64, nc=3):
    """netD of pytorch/examples dcgan/main.py, from its layer table."""
    layers = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for width in (1, 2, 4):
        layers += [nn.Conv2d(ndf * width, ndf * width * 2, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(ndf * width * 2), nn.LeakyReLU(0.2, True)]
    layers += [nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.ModuleDict({"main": nn.Sequential(*layers)})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_defaults_are_the_official_64_pixel_model():
    model = create_model("dcgan")
    assert count(model.generator) == 3_576_704
    assert count(model.discriminator) == 2_765_568
    assert list(model.generator.state_dict()) == list(official_generator().state_dict())
    assert list(model.discriminator.state_dict()) == list(official_discriminator().state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_official_checkpoints_load_both_ways(training):
    torch.manual_seed(0)
    generator, discriminator = official_generator(16, 8), official_discriminator(8)
    model = create_model("dcgan", nz=16, ngf=8, ndf=8)
    model.generator.load_state_dict(generator.state_dict())
    discriminator.load_state_dict(model.discriminator.state_dict())
    for module in (model, generator, discriminator):
        module.train(training)
    z = torch.randn(4, 16)
    images = generator["main"](z[:, :, None, None])
    torch.testing.assert_close(model(z), images, **FLOAT32)
    torch.testing.assert_close(
        model.discriminator.probability(images), discriminator["main"](images).flatten(), **FLOAT32
    )
    generator.load_state_dict(model.generator.state_dict())


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_every_size_samples_images(image_size):
    model = create_model("dcgan", image_size=image_size, channels=1, nz=4, ngf=2, ndf=2)
    images = model.sample(3, generator=torch.Generator().manual_seed(1))
    assert images.shape == (3, 1, image_size, image_size)
    assert model.discriminator(images).shape == (3,)
    assert model(model.latent(2)[:, :, None, None]).shape == (2, 1, image_size, image_size)


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = create_model("dcgan")
    state = model.generator.state_dict()
    assert state["main.3.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["main.1.weight"].mean().item() == pytest.approx(1, abs=0.01)
    assert not state["main.1.bias"].any()


def test_discriminator_without_norm_has_biases_and_no_norm():
    model = DCGAN(DCGANConfig(image_size=32, channels=1, nz=4, ngf=2, ndf=2, discriminator_norm="none"))
    assert [name for name, _ in model.discriminator.named_parameters()][:4] == [
        "main.0.weight",
        "main.0.bias",
        "main.2.weight",
        "main.2.bias",
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.discriminator.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: create_model("dcgn"),
            r"unknown model 'dcgn': did you mean dcgan.*\? choose from: cgan, cyclegan, dcgan",
        ),
        (lambda: create_model("dcgan", image_sise=32), r"option of model dcgan 'image_sise': did you mean image_size"),
        (lambda: create_model("dcgan", image_size=48), "image_size must be one of 32, 64, 128, not 48"),
        (lambda: create_model("dcgan", nz=0), "nz must be between 1 and 65536, not 0"),
        (lambda: create_model("dcgan", discriminator_norm="bach"), "discriminator_norm must be"),
        (lambda: create_model("dcgan", ngf=2, ndf=2)(torch.zeros(2, 99)), r"z must be \(N, 100\) .* not \(2, 99\)"),
        (lambda: create_model("dcgan", ngf=2, ndf=2)(torch.zeros(100)), r"z must be \(N, 100\)"),
        (lambda: create_model("dcgan", ngf=2, ndf=2)(torch.zeros(2, 100, 2, 1)), "z must be"),
        (
            lambda: create_model("dcgan", ngf=2, ndf=2).discriminator(torch.zeros(2, 1, 64, 64)),
            r"images must be \(N, 3, 64, 64\), not \(2, 1, 64, 64\)",
        ),
    ],
)
def test_misuse_names_what_was_wrong(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register_model("dcgan", DCGANConfig)(DCGAN)
    assert fastgen.list_models() == list_models()
