"""Public image-to-image and noise-to-image networks, rebuilt small from the tables of their layers. None uses
fastgen."""

import torch
import torch.nn.functional as F
from torch import nn


class DCGANGenerator(nn.Module):
    """pytorch/examples dcgan: `main.{0,3,6,9,12}`."""

    def __init__(self, z=6, width=4, ngpu=1):
        super().__init__()
        self.ngpu = ngpu
        layers, previous = [], z
        for i, channels in enumerate((8 * width, 4 * width, 2 * width, width)):
            layers += [nn.ConvTranspose2d(previous, channels, 4, 2 if i else 1, 1 if i else 0, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU(True)]
            previous = channels
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(previous, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, input):
        if input.is_cuda and self.ngpu > 1:
            return nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        return self.main(input)


class DCGANDiscriminator(nn.Module):
    """pytorch/examples dcgan: `main.{0,2,5,8,11}`, for 64 pixels; `main.{0,2,5,8}` for 32."""

    def __init__(self, width=4, pixels=32):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for i in (1, 2, 4)[: pixels // 32 + 1]:
            layers += [nn.Conv2d(i * width, 2 * i * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * i * width)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(2 * i * width, 1, 4, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


class ResnetBlock(nn.Module):
    """CycleGAN: `conv_block.{1,5}`, or {1,6} with dropout."""

    def __init__(self, dim, use_dropout, norm=nn.InstanceNorm2d):
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm(dim), nn.ReLU(True)]
        layers += [nn.Dropout(0.5)] if use_dropout else []
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm(dim)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """CycleGAN: `model.{1,4,7}`, blocks, two transposed convolutions, `model.{...}`; InstanceNorm without affine.

    norm: nn.InstanceNorm2d, nn.BatchNorm2d or nn.Identity.
    """

    def __init__(self, width=4, blocks=2, use_dropout=False, norm=nn.InstanceNorm2d):
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=bias), norm(width), nn.ReLU(True)]
        for channels in (width, 2 * width):
            layers += [nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=bias), norm(2 * channels), nn.ReLU(True)]
        layers += [ResnetBlock(4 * width, use_dropout, norm) for _ in range(blocks)]
        for channels in (4 * width, 2 * width):
            layers += [nn.ConvTranspose2d(channels, channels // 2, 3, 2, 1, 1, bias=bias), norm(channels // 2)]
            layers += [nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, input):
        return self.model(input)


class PatchGAN(nn.Module):
    """CycleGAN and pix2pix: `model.{0,2,5,8,11}`."""

    def __init__(self, norm=nn.BatchNorm2d, width=4, hidden=3):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for level in range(1, hidden + 1):
            inputs, outputs = (width * min(2**i, 8) for i in (level - 1, level))
            stride = 2 if level < hidden else 1
            layers += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=norm is nn.InstanceNorm2d)]
            layers += [norm(outputs), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(outputs, 1, 4, 1, 1))

    def forward(self, input):
        return self.model(input)


class PixelDiscriminator(nn.Module):
    """CycleGAN and pix2pix with --netD pixel: `net.{0,2,5}`."""

    def __init__(self, norm=nn.BatchNorm2d, width=4):
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        layers = [nn.Conv2d(3, width, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(width, 2 * width, 1, bias=bias)]
        layers += [norm(2 * width), nn.LeakyReLU(0.2, True), nn.Conv2d(2 * width, 1, 1, bias=bias)]
        self.net = nn.Sequential(*layers)

    def forward(self, input):
        return self.net(input)


class UnetBlock(nn.Module):
    """pix2pix: `model.model.1.model.{1,2,3,5,6}`. The LeakyReLU in front writes to the skip connection."""

    def __init__(self, outer, inner, inside=None, outermost=False, dropout=False, norm=nn.BatchNorm2d):
        super().__init__()
        self.outermost = outermost
        bias = norm is nn.InstanceNorm2d
        down = nn.Conv2d(3 if outermost else outer, inner, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(2 * inner if inside else inner, outer, 4, 2, 1, bias=bias or outermost)
        relu, leaky_relu = nn.ReLU(True), nn.LeakyReLU(0.2, True)
        if outermost:
            layers = [down, inside, relu, up, nn.Tanh()]
        elif inside is None:
            layers = [leaky_relu, down, relu, up, norm(outer)]
        else:
            layers = [leaky_relu, down, norm(inner), inside, relu, up, norm(outer)]
            layers += [nn.Dropout(0.5)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


def unet(width=4, dropout=False):
    block = UnetBlock(4 * width, 4 * width)
    block = UnetBlock(2 * width, 4 * width, block, dropout=dropout)
    block = UnetBlock(width, 2 * width, block)
    return UnetBlock(3, width, block, outermost=True)


class VanillaVAE(nn.Module):
    """AntixK/PyTorch-VAE: `encoder.i.{0,1}`, `decoder.i.{0,1}`, `final_layer.{0,1,3}`; returns reconstruction and
    moments."""

    def __init__(self, latent=5, widths=(4, 6, 8), channels=3):
        super().__init__()
        modules = []
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, 2, 1)
            modules.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU()))
            channels = width
        self.encoder = nn.Sequential(*modules)
        self.fc_mu = nn.Linear(widths[-1] * 4, latent)
        self.fc_var = nn.Linear(widths[-1] * 4, latent)
        self.decoder_input = nn.Linear(latent, widths[-1] * 4)
        modules = []
        for i in range(len(widths) - 1, 0, -1):
            convolution = nn.ConvTranspose2d(widths[i], widths[i - 1], 3, 2, 1, output_padding=1)
            modules.append(nn.Sequential(convolution, nn.BatchNorm2d(widths[i - 1]), nn.LeakyReLU()))
        self.decoder = nn.Sequential(*modules)
        self.final_layer = nn.Sequential(
            nn.ConvTranspose2d(widths[0], widths[0], 3, 2, 1, output_padding=1),
            nn.BatchNorm2d(widths[0]),
            nn.LeakyReLU(),
            nn.Conv2d(widths[0], out_channels=3, kernel_size=3, padding=1),
            nn.Tanh(),
        )
        self.channels = widths[-1]

    def encode(self, input):
        result = torch.flatten(self.encoder(input), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def decode(self, z):
        result = self.decoder_input(z).view(-1, self.channels, 2, 2)
        return self.final_layer(self.decoder(result))

    def reparameterize(self, mu, logvar):
        return torch.randn_like(mu) * torch.exp(0.5 * logvar) + mu

    def forward(self, input, **kwargs):
        mu, log_var = self.encode(input)
        return [self.decode(self.reparameterize(mu, log_var)), mu, log_var]

    def sample(self, number):
        return self.decode(torch.randn(number, self.fc_mu.out_features))


class GBlock(nn.Module):
    """mimicry's generator block: `b1, c1, b2, c2, c_sc`; one in-place ReLU for all, which writes to b1's output."""

    def __init__(self, channels, out):
        super().__init__()
        self.activation = nn.ReLU(True)
        self.c1 = nn.Conv2d(channels, out, 3, 1, padding=1)
        self.c2 = nn.Conv2d(out, out, 3, 1, padding=1)
        self.b1 = nn.BatchNorm2d(channels)
        self.b2 = nn.BatchNorm2d(out)
        self.c_sc = nn.Conv2d(channels, out, 1, 1, padding=0)

    def _upsample_conv(self, x, conv):
        return conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))

    def _residual(self, x):
        h = self.activation(self.b1(x))
        h = self.b2(self._upsample_conv(h, self.c1))
        return self.c2(self.activation(h))

    def _shortcut(self, x):
        return self._upsample_conv(x, self.c_sc)

    def forward(self, x):
        return self._residual(x) + self._shortcut(x)


class SNGANGenerator(nn.Module):
    """mimicry: `l1, blockN.*, b5, c5`."""

    def __init__(self, z=5, width=4):
        super().__init__()
        self.width = width
        self.l1 = nn.Linear(z, 16 * width)
        self.block2 = GBlock(width, width)
        self.block3 = GBlock(width, 3)
        self.b5 = nn.BatchNorm2d(3)
        self.c5 = nn.Conv2d(3, 3, 3, 1, padding=1)
        self.activation = nn.ReLU(True)

    def forward(self, x):
        h = self.l1(x).view(x.shape[0], -1, 4, 4)
        h = self.block3(self.block2(h))
        return torch.tanh(self.c5(self.activation(self.b5(h))))


# name -> (make, shape of the input, names of the runs that fuse: the first module of each and the number of modules)
NETWORKS = {
    "dcgan_g": (DCGANGenerator, (3, 6, 1, 1), {"main.0": 3, "main.3": 3, "main.6": 3, "main.9": 3, "main.12": 2}),
    "dcgan_d": (DCGANDiscriminator, (3, 3, 32, 32), {"main.0": 2, "main.2": 3, "main.5": 3, "main.8": 2}),
    "cyclegan": (
        ResnetGenerator,
        (2, 3, 16, 16),
        {
            "model.1": 3, "model.4": 3, "model.7": 3, "model.10.conv_block.1": 3, "model.10.conv_block.5": 2,
            "model.11.conv_block.1": 3, "model.11.conv_block.5": 2, "model.12": 3, "model.15": 3, "model.19": 2,
        },
    ),
    "cyclegan_dropout": (
        lambda: ResnetGenerator(blocks=1, use_dropout=True),
        (2, 3, 16, 16),
        {
            "model.1": 3, "model.4": 3, "model.7": 3, "model.10.conv_block.1": 3, "model.10.conv_block.6": 2,
            "model.11": 3, "model.14": 3, "model.18": 2,
        },
    ),
    "patchgan_bn": (PatchGAN, (2, 3, 32, 32), {"model.0": 2, "model.2": 3, "model.5": 3, "model.8": 3}),
    "patchgan_in": (
        lambda: PatchGAN(nn.InstanceNorm2d), (2, 3, 32, 32), {"model.0": 2, "model.2": 3, "model.5": 3, "model.8": 3},
    ),
    "unet": (
        unet,
        (2, 3, 32, 32),
        {
            "model.1.model.1": 2, "model.1.model.3.model.1": 2, "model.1.model.3.model.3.model.1": 2,
            "model.1.model.3.model.3.model.3": 2, "model.1.model.3.model.5": 2, "model.1.model.5": 2, "model.3": 2,
        },
    ),
    "unet_dropout": (
        lambda: unet(dropout=True),
        (2, 3, 32, 32),
        {
            "model.1.model.1": 2, "model.1.model.3.model.1": 2, "model.1.model.3.model.3.model.1": 2,
            "model.1.model.3.model.3.model.3": 2, "model.1.model.3.model.5": 2, "model.1.model.5": 2, "model.3": 2,
        },
    ),
    "vae": (
        VanillaVAE,
        (3, 3, 16, 16),
        {
            "encoder.0.0": 3, "encoder.1.0": 3, "encoder.2.0": 3, "decoder.0.0": 3, "decoder.1.0": 3,
            "final_layer.0": 3, "final_layer.3": 2,
        },
    ),
    "sngan": (
        SNGANGenerator,
        (3, 5),
        {"block2.b1": 2, "block2.c1": 3, "block3.b1": 2, "block3.c1": 3, "b5": 2},
    ),
}  # fmt: skip
