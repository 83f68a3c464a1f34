"""Networks that other projects trained: each dialect is known by its keys, and the sizes are read from the tensors."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import CheckpointError, UsageError, unknown_name
from fastgen.models.dcgan import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from fastgen.models.patchgan import PatchGAN
from fastgen.models.resnet_generator import ResnetGenerator
from fastgen.models.unet import UnetGenerator
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.vae_mlp import MLPVAE, MLPVAEConfig

_MAX_KEYS = 100_000
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # of what trainers save around a network's tensors
_PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, Lightning and torch.compile

State = dict[str, Tensor]


def load_checkpoint(path: str | Path, dialect: str = "auto") -> nn.Module:
    """The network of a checkpoint that another project saved, in eval mode on the CPU.

    No code of the file is run: `.safetensors`, or what torch.save wrote, read with weights_only=True.

    Args:
        path: the file.
        dialect: which project's, by the names of its tensors; "auto" looks. A generator and a discriminator are files of
            their own there:
            "pytorch-examples-dcgan": netG (`DCGANGenerator`) or netD (`DCGANDiscriminator`, whose sigmoid is `probability`);
            "pytorch-examples-vae": `MLPVAE`; images are in [0, 1] there and in [-1, 1] here;
            "pytorch-vae": PyTorch-VAE's VanillaVAE (`VAE`), with or without its experiment around it;
            "pytorch-cyclegan-and-pix2pix": `ResnetGenerator`, `UnetGenerator` or `PatchGAN`.

    A pix2pix generator there draws with the statistics of the batch unless it is told --eval: call `train()` on the one that is
    returned for the same images.

    Raises:
        UsageError: an unknown dialect.
        CheckpointError: no such file, a damaged one, one that holds more than tensors, or none of that dialect.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise unknown_name("dialect", dialect, ("auto", *DIALECTS))
    state = _read(Path(path))
    for name, reader in DIALECTS.items():
        if dialect not in ("auto", name):
            continue
        for candidate in _unprefixed(state):
            try:
                network = reader(candidate)
            except (UsageError, KeyError, IndexError, ValueError, RuntimeError, OverflowError) as error:
                raise CheckpointError(f"{path} looks like {name} and is not: {error}") from error
            if network is not None:
                return _filled(network, candidate, f"{path} looks like {name} and is not")
    known = "a known dialect" if dialect == "auto" else f"dialect {dialect}"
    keys = ", ".join(list(state)[:5])
    raise CheckpointError(f"{path} is not of {known} ({', '.join(DIALECTS)}): its tensors are {keys}, ...")


def _read(path: Path) -> State:
    """The tensors of a file, by name, after a look at what they would make of the memory."""
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise CheckpointError(f"{path} is compressed, which torch.save never does")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged; nothing of it was run ({reason})"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no checkpoint: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or len(content) > _MAX_KEYS:
        raise CheckpointError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, value in state.items():
        if value.layout is not torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path} is damaged: {name} is larger than its data")
    return state


def _unprefixed(state: State) -> list[State]:
    """The state under each prefix that all of its keys have, itself first."""
    found = [state]
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in found[-1]):
            found.append({name[len(prefix) :]: value for name, value in found[-1].items()})
    return found


def _filled(network: nn.Module, state: State, complaint: str) -> nn.Module:
    """The network, made on the meta device, with the tensors of `state`, in its own dtypes."""
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state and name != "log_std"]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        raise CheckpointError(
            f"{complaint}: " + (f"it has no {missing[0]}" if missing else f"it has {unknown[0]} besides")
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise CheckpointError(f"{complaint}: {name} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
    state = {name: value.to(wanted[name].dtype).contiguous() for name, value in state.items()}
    if "log_std" in wanted:
        state.setdefault("log_std", torch.zeros(()))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(True).eval()


def _dcgan(state: State) -> nn.Module | None:
    if "main.0.weight" not in state or not all(re.match(r"main\.\d+\.", name) for name in state):
        return None
    convolutions = {int(name.split(".")[1]): value for name, value in state.items() if value.dim() == 4}
    first, last = convolutions[0].shape, convolutions[max(convolutions)].shape
    image_size = 2 ** (len(convolutions) + 1)
    with torch.device("meta"):
        if "main.1.weight" in state:  # a norm follows the first transposed convolution at once
            return DCGANGenerator(DCGANConfig(image_size, channels=last[1], nz=first[0], ngf=last[0]))
        norm: Any = "none" if "main.0.bias" in state else "batch"  # fastgen's own for penalties, and the original
        return DCGANDiscriminator(DCGANConfig(image_size, channels=first[1], ndf=first[0], discriminator_norm=norm))


def _examples_vae(state: State) -> nn.Module | None:
    if not {"fc1.weight", "fc21.weight", "fc22.weight", "fc3.weight", "fc4.weight"} <= state.keys():
        return None
    pixels, (width, nz) = state["fc1.weight"].shape[1], state["fc3.weight"].shape
    image_size = round(pixels**0.5)
    channels = 1
    if image_size**2 != pixels:
        image_size, channels = round((pixels / 3) ** 0.5), 3
    with torch.device("meta"):
        return MLPVAE(MLPVAEConfig(image_size=image_size, channels=channels, nz=nz, width=width))


def _pytorch_vae(state: State) -> nn.Module | None:
    if not {"fc_mu.weight", "fc_var.weight", "decoder_input.weight", "final_layer.3.weight"} <= state.keys():
        return None
    levels = _count(state, r"encoder\.(\d+)\.0\.weight")
    widths = [state[f"encoder.{level}.0.weight"].shape[0] for level in range(levels)]
    nz, flat = state["fc_mu.weight"].shape
    pixels = round((flat / widths[-1]) ** 0.5)
    channels = state["encoder.0.0.weight"].shape[1]
    with torch.device("meta"):
        return VAE(VAEConfig(pixels * 2**levels, channels, nz, tuple(widths)))


def _cyclegan_and_pix2pix(state: State) -> nn.Module | None:
    if {"model.1.weight", "model.10.conv_block.1.weight"} <= state.keys():
        return _resnet(state)
    if {"model.model.0.weight", "model.model.3.weight"} <= state.keys():
        return _unet(state)
    if {"model.0.weight", "model.2.weight"} <= state.keys() and state["model.0.weight"].shape[2:] == (4, 4):
        norm = _norm(state, "model.3")
        width, inputs = state["model.0.weight"].shape[:2]
        with torch.device("meta"):
            return PatchGAN(inputs, width, sum(value.dim() == 4 for value in state.values()) - 2, norm)
    return None


def _resnet(state: State) -> nn.Module:
    norm = _norm(state, "model.2")
    blocks = _count(state, r"model\.(\d+)\.conv_block\.1\.weight", start=10)
    last = f"model.{10 + blocks + 7}.weight"
    width, inputs = state["model.1.weight"].shape[:2]
    dropout = "model.10.conv_block.6.weight" in state and state["model.10.conv_block.6.weight"].dim() == 4
    with torch.device("meta"):
        return ResnetGenerator(inputs, state[last].shape[0], width, blocks, norm, dropout)


def _unet(state: State) -> nn.Module:
    norm = _norm(state, "model.model.1.model.2")
    depth = max(name.count("model.") for name in state if name.endswith("model.1.weight")) - 1
    width, inputs = state["model.model.0.weight"].shape[:2]
    with torch.device("meta"):
        return UnetGenerator(inputs, state["model.model.3.weight"].shape[1], width, depth, norm)


def _norm(state: State, name: str) -> str:
    """The kind of the norm `name`; of an instance norm the running statistics, which old versions saved, are dropped."""
    if f"{name}.weight" in state:
        return "batch"
    for key in [key for key in state if key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))]:
        del state[key]
    return "instance"


def _count(state: State, pattern: str, start: int = 0) -> int:
    """How many numbers from `start` on the keys have without a gap, in the pattern's place."""
    numbers = {int(match[1]) for name in state if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(start, start + len(numbers) + 1) if number not in numbers) - start


DIALECTS: dict[str, Callable[[Any], nn.Module | None]] = {
    "pytorch-examples-dcgan": _dcgan,
    "pytorch-examples-vae": _examples_vae,
    "pytorch-vae": _pytorch_vae,
    "pytorch-cyclegan-and-pix2pix": _cyclegan_and_pix2pix,
}
