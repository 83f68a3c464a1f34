"""The networks of other projects: each is recognised by the names and kernel sizes of its tensors, which also give its
sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.errors import CheckpointError
from fastgen.models.dcgan import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from fastgen.models.patchgan import PatchGAN, PixelDiscriminator
from fastgen.models.resnet_generator import ResnetGenerator
from fastgen.models.unet import UnetGenerator
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.vae_mlp import MLPVAE, MLPVAEConfig

State = dict[str, Tensor]


class Kind(NamedTuple):
    """A kind of network of a dialect."""

    dialect: str
    signs: dict[str, tuple[int, ...]]
    """Names of some of its tensors -> kernel size at the end of the shape. The first occurs once per network."""
    read: Callable[[State, bool | None], nn.Module]
    """Makes the network on the meta device, from its tensors and the requested dropout. It may drop tensors.

    Raises:
        CheckpointError, UsageError: the tensors are not those of such a network; the message says why.
    """

    def prefixes(self, state: State) -> list[str]:
        """The prefix of the names of each network of this kind in `state`."""
        first = next(iter(self.signs))
        candidates = [name[: -len(first)] for name in state if name == first or name.endswith(f".{first}")]
        return [prefix for prefix in candidates if all(self._has(state, prefix + name, name) for name in self.signs)]

    def _has(self, state: State, full: str, name: str) -> bool:
        kernel = self.signs[name]
        return full in state and state[full].dim() == 2 + len(kernel) and state[full].shape[2:] == kernel


def _shape(state: State, name: str, dims: int = 4) -> torch.Size:
    if name not in state:
        raise CheckpointError(f"it has no {name}")
    shape = state[name].shape
    if len(shape) != dims or 0 in shape:
        raise CheckpointError(f"{name} is {tuple(shape)}, not of {dims} dimensions")
    return shape


def _dcgan(state: State, _: bool | None) -> nn.Module:
    numbers = {int(match[1]) for name in state if (match := re.fullmatch(r"main\.(\d+)\.weight", name))}
    convolutions = [number for number in sorted(numbers) if state[f"main.{number}.weight"].dim() == 4]
    first, last = (_shape(state, f"main.{number}.weight") for number in (convolutions[0], convolutions[-1]))
    image_size = 2 ** (len(convolutions) + 1)
    with torch.device("meta"):
        if "main.1.weight" in state:  # a norm directly after the first transposed convolution
            return DCGANGenerator(DCGANConfig(image_size, channels=last[1], nz=first[0], ngf=last[0]))
        norm: Any = (
            "none" if "main.0.bias" in state else "batch"
        )  # fastgen's own network for penalties, or the original
        return DCGANDiscriminator(DCGANConfig(image_size, channels=first[1], ndf=first[0], discriminator_norm=norm))


def _examples_vae(state: State, _: bool | None) -> nn.Module:
    pixels, (width, nz) = _shape(state, "fc1.weight", 2)[1], _shape(state, "fc3.weight", 2)
    sizes = [(math.isqrt(pixels // channels), channels) for channels in (1, 3)]
    fitting = [(size, channels) for size, channels in sizes if channels * size**2 == pixels]
    if not fitting:
        raise CheckpointError(f"its {pixels} pixels are not a square image of 1 or 3 channels")
    image_size, channels = fitting[0]
    with torch.device("meta"):
        return MLPVAE(MLPVAEConfig(image_size=image_size, channels=channels, nz=nz, width=width))


def _pytorch_vae(state: State, _: bool | None) -> nn.Module:
    levels = _count(state, r"encoder\.(\d+)\.0\.weight")
    channels = _shape(state, "encoder.0.0.weight")[1]
    widths = tuple(_shape(state, f"encoder.{level}.0.weight")[0] for level in range(levels))
    nz, flat = _shape(state, "fc_mu.weight", 2)
    pixels = math.isqrt(flat // widths[-1])
    if pixels**2 * widths[-1] != flat:
        raise CheckpointError(f"fc_mu.weight takes {flat} features, which are not a square of {widths[-1]} channels")
    decoded, width = _shape(state, "final_layer.3.weight")[:2]
    with torch.device("meta"):
        vae = VAE(VAEConfig(pixels * 2**levels, channels, nz, widths))
        if decoded != channels:  # the original decodes to 3 channels, whatever it encodes
            vae.final_layer[3] = nn.Conv2d(width, decoded, 3, padding=1)
    # not persistent: the original has no such tensor, and must be able to load what this network saves
    vae.register_buffer("log_std", torch.zeros((), dtype=torch.float32, device="cpu"), persistent=False)
    return vae


def _resnet(state: State, _: bool | None) -> nn.Module:
    if any(name.endswith(".filt") for name in state):
        raise CheckpointError("it has blurring resampling layers (.filt), which fastgen's network lacks")
    if "model.10.conv_block.0.weight" in state:
        raise CheckpointError("its blocks pad with zeros (model.10.conv_block.0), but fastgen's pad by reflection")
    norm = _norm(state, "model.1", "model.2")
    blocks = _count(state, r"model\.(\d+)\.conv_block\.\d+\.weight", start=10)
    width, inputs = _shape(state, "model.1.weight")[:2]
    outputs = _shape(state, f"model.{10 + blocks + 7}.weight")[0]
    second = state.get("model.10.conv_block.6.weight")
    drops = second is not None and second.dim() == 4  # dropout takes a position in a block
    with torch.device("meta"):
        return ResnetGenerator(inputs, outputs, width, blocks, norm, drops)


def _unet(state: State, dropout: bool | None) -> nn.Module:
    norm = _norm(state, "model.model.0", "model.model.1.model.2")
    width, inputs = _shape(state, "model.model.0.weight")[:2]
    depth, block = 1, "model.model.1."
    while f"{block}model.1.weight" in state:
        depth, block = depth + 1, f"{block}model.3."
    if depth < 2:
        raise CheckpointError("it has no model.model.1.model.1.weight")
    outputs = _shape(state, "model.model.3.weight")[1]
    with torch.device("meta"):
        return UnetGenerator(inputs, outputs, width, depth, norm, norm == "batch" if dropout is None else dropout)


def _patchgan(state: State, _: bool | None) -> nn.Module:
    norm = _norm(state, "model.2", "model.3")
    width, inputs = _shape(state, "model.0.weight")[:2]
    with torch.device("meta"):
        return PatchGAN(inputs, width, sum(value.dim() == 4 for value in state.values()) - 2, norm)


def _pixel(state: State, _: bool | None) -> nn.Module:
    norm = _norm(state, "net.2", "net.3")
    width, inputs = _shape(state, "net.0.weight")[:2]
    with torch.device("meta"):
        return PixelDiscriminator(inputs, width, norm)


def _norm(state: State, convolution: str, norm: str) -> str:
    """The kind of norm of a network, from a convolution (which has a bias only before instance norm) and the norm after
    it. Running statistics that old versions saved with instance norms are dropped, as by that project.
    """
    if f"{norm}.weight" in state:
        return "batch"
    if f"{convolution}.bias" not in state:
        return "none"
    for key in [key for key in state if key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))]:
        del state[key]
    return "instance"


def _count(state: State, pattern: str, start: int = 0) -> int:
    """How many consecutive numbers from `start` on the names have where the pattern has its group."""
    numbers = {int(match[1]) for name in state if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(start, start + len(numbers) + 1) if number not in numbers) - start


_TRANSLATORS = "pytorch-cyclegan-and-pix2pix"
KINDS = (
    Kind("pytorch-examples-dcgan", {"main.0.weight": (4, 4)}, _dcgan),
    Kind(
        "pytorch-examples-vae", {f"{name}.weight": () for name in ("fc21", "fc22", "fc1", "fc3", "fc4")}, _examples_vae
    ),
    Kind("pytorch-vae", {"fc_mu.weight": (), "fc_var.weight": (), "encoder.0.0.weight": (3, 3)}, _pytorch_vae),
    Kind(_TRANSLATORS, {"model.1.weight": (7, 7), "model.4.weight": (3, 3)}, _resnet),
    Kind(_TRANSLATORS, {"model.model.0.weight": (4, 4), "model.model.3.weight": (4, 4)}, _unet),
    Kind(_TRANSLATORS, {"model.0.weight": (4, 4), "model.2.weight": (4, 4), "model.5.weight": (4, 4)}, _patchgan),
    Kind(_TRANSLATORS, {"net.0.weight": (1, 1), "net.2.weight": (1, 1), "net.5.weight": (1, 1)}, _pixel),
)
DIALECTS = tuple(dict.fromkeys(kind.dialect for kind in KINDS))
