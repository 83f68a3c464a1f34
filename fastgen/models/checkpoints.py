"""Loads networks that other projects trained: looks for them in a file, and picks one."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import CheckpointError, UsageError, unknown_name
from fastgen.models.dialects import DIALECTS, KINDS, Kind, State
from fastgen.models.unet import UnetGenerator

_MAX_ENTRIES = 100_000  # dictionaries and lists in a file
_MAX_DEPTH = 8  # of nesting
# names that DataParallel, AveragedModel and torch.compile add around any part of a network
_WRAPPERS = ("module", "_orig_mod")
_NOT_CHECKPOINTS = {
    (b"version https://git-lfs",): "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    (b"<!doctype", b"<html", b"<?xml"): "a web page",
}


class _Network(NamedTuple):
    """A network in a file."""

    name: str
    kind: Kind
    state: State


def load_checkpoint(
    path: str | os.PathLike[str], dialect: str = "auto", *, network: str | None = None, dropout: bool | None = None
) -> nn.Module:
    """The network of a checkpoint that another project saved, in eval mode, in float32 on the CPU.

    No code of the file is run: it is `.safetensors`, or a file of torch.save that is read with weights_only=True.
    Dictionaries around the network's tensors, prefixes such as DataParallel's, Lightning's or torch.compile's,
    optimizers and other values are skipped. The returned network's state_dict has the original's names, so the original
    can load it.

    Args:
        path: the file.
        dialect: the project that saved it; "auto" tells by the names of the tensors:
            "pytorch-examples-dcgan": netG (`DCGANGenerator`) or netD (`DCGANDiscriminator`, whose sigmoid is
            `probability`); "pytorch-examples-vae": `MLPVAE`; images are in [0, 1] there and in [-1, 1] here;
            "pytorch-vae": PyTorch-VAE's VanillaVAE (`VAE`), with or without its experiment around it. As there, it
            decodes to 3 channels whatever its `in_channels`;
            "pytorch-cyclegan-and-pix2pix": `ResnetGenerator`, `UnetGenerator`, `PatchGAN` or `PixelDiscriminator`.
        network: name of the network in a file that holds several: "netG", or for nested dictionaries "ema.netG". By
            default the file must hold one.
        dropout: whether a U-Net has dropout, which the names of its tensors do not show: False for one that was trained
            with `--no_dropout`. The default is that project's: dropout in pix2pix (batch norm), none in CycleGAN
            (instance norm).

    That project's pix2pix generators run with dropout and batch statistics unless --eval is given: call `train()` on
    the returned network to do the same.

    Raises:
        UsageError: an unknown dialect, no such network in the file, or dropout that its tensors contradict.
        CheckpointError: the file is missing, damaged, or holds more than tensors, or not exactly one network.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise unknown_name("dialect", dialect, ("auto", *DIALECTS))
    if not (network is None or isinstance(network, str)):
        raise UsageError(f"network must be a name, not {network!r}")
    if not (dropout is None or isinstance(dropout, bool)):
        raise UsageError(f"dropout must be True, False or None, not {dropout!r}")
    path = Path(path)
    content = _read(path)
    try:
        states = list(_states(content))
        chosen = _choose([one for name, state in states for one in _networks(name, state)], dialect, network)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    if chosen is None:
        known = "a known dialect" if dialect == "auto" else f"dialect {dialect}"
        raise CheckpointError(f"{path} is not of {known} ({', '.join(DIALECTS)}): {_contents(content, states)}")
    try:
        _check_sizes(chosen.state, path.stat().st_size)
        module = _filled(chosen.kind.read(chosen.state, dropout), chosen.state)
    except (RuntimeError, ValueError, OverflowError) as error:  # fastgen's, and PyTorch's for impossible sizes
        where = f"{chosen.name!r} in {path}" if chosen.name else f"{path}"
        raise CheckpointError(f"{where} looks like {chosen.kind.dialect}, but is not: {error}") from error
    has_dropout = any(isinstance(child, nn.Dropout) for child in module.modules())
    if dropout not in (None, has_dropout) and not isinstance(module, UnetGenerator):
        raise UsageError(f"dropout must be {has_dropout} or left out for {path}: the names of its tensors show it")
    return module


def _read(path: Path) -> Any:
    """The content of a file, with tensors on the CPU."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        hint = "; fastgen.training.load_model reads a run folder" if path.is_dir() else ""
        raise CheckpointError(f"{path} cannot be read: {error.strerror}{hint}") from error
    if not head:
        raise CheckpointError(f"{path} is not a checkpoint: it is empty")
    for starts, what in _NOT_CHECKPOINTS.items():
        if head.lstrip().lower().startswith(starts):
            raise CheckpointError(f"{path} is not a checkpoint, but {what}")
    try:
        header = int.from_bytes(head[:8], "little")  # its length, in safetensors
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and header < size):
            return load_file(path, device="cpu")
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        text = str(error)
        named = re.search(r"(?:GLOBAL|class) (\S+)", text)
        reason = f"it names {named[1]}" if named else text.splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged; none of its code was run ({reason}). "
            "If you trust it, save only the network's state_dict() and load that"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged, or not a checkpoint ({reason})") from error


def _check_archive(path: Path) -> None:
    """Refuses archives that torch.save did not write."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program, which is not run: save torch.jit.load(...).state_dict() and load that"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is an archive that torch.save did not write: it has no data.pkl")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is compressed, which torch.save never does")


def _states(content: Any) -> Iterator[tuple[str, State]]:
    """The path of each dictionary or list that holds tensors, with these tensors by name; the outermost first."""
    todo: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while todo:
        path, value = todo.popleft()
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if len(seen) > _MAX_ENTRIES:
            raise CheckpointError(f"holds more than {_MAX_ENTRIES} dictionaries and lists")
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        state = {name: item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)}
        if state:
            yield ".".join(path), _unwrapped(state)
        todo.extend(((*path, str(name)), item) for name, item in items if not isinstance(item, Tensor))


def _unwrapped(state: State) -> State:
    """The tensors, without the names that wrappers around parts of a network add."""
    clean: State = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if parts[-1:] == ["n_averaged"]:  # AveragedModel's counter
            continue
        if (short := ".".join(parts)) in clean:
            raise CheckpointError(f"holds {short} twice, once as {name}")
        clean[short] = value
    return clean


def _networks(name: str, state: State) -> Iterator[_Network]:
    """The networks of known kinds among the tensors of one dictionary."""
    for kind in KINDS:
        for prefix in kind.prefixes(state):
            network_state = {full[len(prefix) :]: value for full, value in state.items() if full.startswith(prefix)}
            yield _Network(".".join(filter(None, (name, prefix[:-1]))), kind, network_state)


def _choose(networks: list[_Network], dialect: str, name: str | None) -> _Network | None:
    """The requested network; None if there is none of this dialect."""
    networks = [one for one in networks if dialect in ("auto", one.kind.dialect)]
    if name is not None and networks:
        exact = [one for one in networks if one.name == name]
        chosen = exact or [one for one in networks if name and f".{name}." in f".{one.name}."]
        if not chosen:
            raise unknown_name("network", name, [one.name or "''" for one in networks])
        networks = chosen
    if len(networks) > 1:
        listed = ", ".join(f"{one.name!r} ({one.kind.dialect})" for one in networks[:20])
        raise CheckpointError(
            f"holds {len(networks)} networks: {listed}. Say which with the argument network={networks[0].name!r}"
        )
    return networks[0] if networks else None


def _contents(content: Any, states: list[tuple[str, State]]) -> str:
    """A description of what a file holds, in one line."""
    if not states:
        return f"it holds no tensors by name, but a {type(content).__name__}"
    shown = [(name, ", ".join(list(state)[:5])) for name, state in states[:5]]
    return "its tensors are " + "; ".join(f"{names}, ..." + (f" in {name!r}" if name else "") for name, names in shown)


def _check_sizes(state: State, size: int) -> None:
    """Refuses tensors that a file of `size` bytes cannot hold, before memory is allocated for them."""
    for name, value in state.items():
        if value.is_meta:
            raise CheckpointError(f"holds no data of {name}, which was saved from the meta device")
    if sum(value.numel() * value.element_size() for value in state.values()) > 4 * size + 2**20:  # some may be shared
        largest = max(state, key=lambda name: state[name].numel())
        raise CheckpointError(f"{largest} is larger than its data")


def _filled(network: nn.Module, state: State) -> nn.Module:
    """The network, which is on the meta device, with the tensors of `state` in float32."""
    expected = network.state_dict()
    filled = {}
    for name in expected:
        if name not in state:
            if not name.endswith("num_batches_tracked"):  # new in PyTorch 0.4.1
                raise CheckpointError(f"it has no {name}")
            filled[name] = torch.zeros((), dtype=torch.int64, device="cpu")
    for name, value in state.items():
        if name not in expected:
            raise CheckpointError(f"it has {name} too")
        if value.shape != expected[name].shape:
            raise CheckpointError(f"{name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        if value.layout is not torch.strided or (expected[name].is_floating_point() and not value.is_floating_point()):
            raise CheckpointError(f"{name} is of {value.dtype} and {value.layout}, not dense floating-point numbers")
    for name, value in state.items():  # copies: parameters that are trained must not share memory
        dtype = torch.float32 if expected[name].is_floating_point() else expected[name].dtype
        filled[name] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(filled, assign=True)
    return network.requires_grad_(True).eval()
