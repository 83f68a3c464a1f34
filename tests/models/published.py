"""The networks of other projects that load_checkpoint knows, with the options that change them."""

import functools

import torch
from torch import nn

from tests.support import networks


class ExamplesVAE(nn.Module):
    """pytorch/examples vae: `fc1, fc21, fc22, fc3, fc4`; pixels in [0, 1]."""

    def __init__(self, pixels=784, width=10, nz=4):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(pixels, width), nn.Linear(width, nz), nn.Linear(width, nz)
        self.fc3, self.fc4 = nn.Linear(nz, width), nn.Linear(width, pixels)

    def encode(self, x):
        h = self.fc1(x).relu()
        return self.fc21(h), self.fc22(h)

    def forward(self, x):
        mu, _ = self.encode(x.flatten(1))
        return self.fc4(self.fc3(mu).relu()).sigmoid().view_as(x)


class MeanVanillaVAE(networks.VanillaVAE):
    def forward(self, x):
        return self.decode(self.encode(x)[0])


def unet(norm=nn.BatchNorm2d, dropout=False):
    block = networks.UnetBlock(16, 16, norm=norm)
    for outer, inner in ((16, 16), (8, 16), (4, 8), (2, 4)):
        block = networks.UnetBlock(outer, inner, block, dropout=dropout and outer == 16, norm=norm)
    return nn.ModuleDict({"model": networks.UnetBlock(3, 2, block, outermost=True, norm=norm)})


def call_unet(network, x):
    return network["model"](x)


def mean_of(vae):
    return lambda images: vae.decode(vae.encode(images)[0])


TRANSLATORS = "pytorch-cyclegan-and-pix2pix"
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": nn.Identity}
# name -> (dialect, the original network, how it is called, the shape of its input, how fastgen's network is called)
PUBLISHED = {
    "netG": ("pytorch-examples-dcgan", lambda: networks.DCGANGenerator(), nn.Module.__call__, (3, 6, 1, 1), None),
    "netD": (
        "pytorch-examples-dcgan", lambda: networks.DCGANDiscriminator(pixels=64), nn.Module.__call__, (3, 3, 64, 64),
        lambda network: network.probability,
    ),
    "netD, 32 pixels": (
        "pytorch-examples-dcgan", networks.DCGANDiscriminator, nn.Module.__call__, (3, 3, 32, 32),
        lambda network: network.probability,
    ),
    "examples vae": (
        "pytorch-examples-vae", ExamplesVAE, lambda network, x: 2 * network((x + 1) / 2) - 1, (3, 1, 28, 28), mean_of
    ),
    "PyTorch-VAE": ("pytorch-vae", MeanVanillaVAE, nn.Module.__call__, (3, 3, 16, 16), mean_of),
    "CycleGAN": (TRANSLATORS, lambda: networks.ResnetGenerator(blocks=6), nn.Module.__call__, (2, 3, 16, 20), None),
    "PatchGAN": (TRANSLATORS, networks.PatchGAN, nn.Module.__call__, (2, 3, 32, 32), None),
    "pix2pix": (TRANSLATORS, lambda: unet(dropout=True), call_unet, (2, 3, 64, 64), None),
    "PyTorch-VAE, 1 channel": ("pytorch-vae", lambda: MeanVanillaVAE(channels=1), nn.Module.__call__, (3, 1, 16, 16),
    mean_of), "PyTorch-VAE, 1 layer": ("pytorch-vae", lambda: MeanVanillaVAE(widths=(4,)), nn.Module.__call__, (3, 3, 4,
    4), mean_of),
}  # fmt: skip
for norm, layer in NORMS.items():
    for dropout in (False, True):
        PUBLISHED[f"CycleGAN, {norm}, dropout={dropout}"] = (
            TRANSLATORS,
            functools.partial(networks.ResnetGenerator, blocks=1, use_dropout=dropout, norm=layer),
            nn.Module.__call__,
            (2, 3, 16, 16),
            None,
        )
    for name, network in {
        "1 layer": functools.partial(networks.PatchGAN, layer, hidden=1),
        "4 layers": functools.partial(networks.PatchGAN, layer, hidden=4),
        "pixel": functools.partial(networks.PixelDiscriminator, layer),
    }.items():
        PUBLISHED[f"PatchGAN, {norm}, {name}"] = (TRANSLATORS, network, nn.Module.__call__, (2, 3, 64, 64), None)
    PUBLISHED[f"U-Net, {norm}"] = (TRANSLATORS, functools.partial(unet, layer), call_unet, (2, 3, 64, 64), None)


def published(name):
    torch.manual_seed(0)
    network = PUBLISHED[name][1]()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    return network.eval()
