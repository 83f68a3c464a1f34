"""Files of networks that other projects trained: what is in them, and which of it to load."""

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
_MAX_DEPTH = 8  # of one in another
_WRAPPERS = ("module", "_orig_mod")  # of DataParallel, AveragedModel and torch.compile, around any part of a network
_OTHERS = {
    (b"version https://git-lfs",): "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    (b"<!doctype", b"<html", b"<?xml"): "a web page",
}


class _Found(NamedTuple):
    """A network in a file."""

    name: str
    kind: Kind
    state: State


def load_checkpoint(
    path: str | os.PathLike[str], dialect: str = "auto", *, network: str | None = None, dropout: bool | None = None
) -> nn.Module:
    """The network of a checkpoint that another project saved, in eval mode, in float32 on the CPU.

    No code of the file is run: `.safetensors`, or what torch.save wrote, read with weights_only=True. Dictionaries
    around the network's tensors, the prefixes of DataParallel, Lightning, torch.compile and the like, optimizers and
    numbers beside them are passed over. The state_dict of what is returned has the names of the original's, which loads
    it.

    Args:
        path: the file.
        dialect: which project's, by the names of its tensors; "auto" looks:
            "pytorch-examples-dcgan": netG (`DCGANGenerator`) or netD (`DCGANDiscriminator`, whose sigmoid is
            `probability`); "pytorch-examples-vae": `MLPVAE`; images are in [0, 1] there and in [-1, 1] here;
            "pytorch-vae": PyTorch-VAE's VanillaVAE (`VAE`), with or without its experiment around it. As there, one of
            other than 3 `in_channels` decodes 3;
            "pytorch-cyclegan-and-pix2pix": `ResnetGenerator`, `UnetGenerator`, `PatchGAN` or `PixelDiscriminator`.
        network: which one of a file that holds several, by the name that it has there: "netG", or with dots a part of a
            part, "ema.netG". Without it a file must hold one.
        dropout: of a U-Net, which the names of its tensors do not show: True, or False for one that was trained with
            `--no_dropout`. By default as that project trains it: with dropout in pix2pix (batch norm), without in
            CycleGAN (instance norm).

    A pix2pix generator there draws with dropout and the statistics of the batch unless it is told --eval: call
    `train()` on the one that is returned to do the same.

    Raises:
        UsageError: an unknown dialect, no such network in the file, or dropout that its tensors contradict.
        CheckpointError: no such file, a damaged one, one that holds more than tensors, none or several of that dialect.
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
        found = _choose([one for name, state in states for one in _networks(name, state)], dialect, network)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    if found is None:
        known = "a known dialect" if dialect == "auto" else f"dialect {dialect}"
        raise CheckpointError(f"{path} is not of {known} ({', '.join(DIALECTS)}): {_contents(content, states)}")
    try:
        _check_sizes(found.state, path.stat().st_size)
        made = _filled(found.kind.read(found.state, dropout), found.state)
    except (RuntimeError, ValueError, OverflowError) as error:  # ours, and PyTorch's of sizes that cannot be
        where = f"{found.name!r} in {path}" if found.name else f"{path}"
        raise CheckpointError(f"{where} looks like {found.kind.dialect} and is not: {error}") from error
    shown = any(isinstance(module, nn.Dropout) for module in made.modules())
    if dropout not in (None, shown) and not isinstance(made, UnetGenerator):
        raise UsageError(f"dropout must be {shown} or left out for {path}: the names of its tensors show it")
    return made


def _read(path: Path) -> Any:
    """What is in a file; tensors are on the CPU."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        hint = ", and fastgen.training.load_model reads the folder of a run" if path.is_dir() else ""
        raise CheckpointError(f"{path} cannot be read: {error.strerror}{hint}") from error
    if not head:
        raise CheckpointError(f"{path} is no checkpoint: it is empty")
    for starts, what in _OTHERS.items():
        if head.lstrip().lower().startswith(starts):
            raise CheckpointError(f"{path} is no checkpoint, but {what}")
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
            f"{path} holds more than tensors, or is damaged; nothing of it was run ({reason}). "
            "Where you trust it, save the network's state_dict() alone and load that"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({reason})") from error


def _check_archive(path: Path) -> None:
    """Refuses what torch.save has not written."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a program of TorchScript, which is not run: save torch.jit.load(...).state_dict() and load that"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is an archive that torch.save has not written: it has no data.pkl")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is compressed, which torch.save never does")


def _states(content: Any) -> Iterator[tuple[str, State]]:
    """Where a dictionary or list in a file holds tensors, and these, by name; the outermost first."""
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
    """The tensors, without what modules around a part of a network add to their names."""
    clean: State = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if parts[-1:] == ["n_averaged"]:  # AveragedModel's counter
            continue
        if (short := ".".join(parts)) in clean:
            raise CheckpointError(f"holds {short} twice, once as {name}")
        clean[short] = value
    return clean


def _networks(name: str, state: State) -> Iterator[_Found]:
    """The networks of a known kind among the tensors of one dictionary."""
    for kind in KINDS:
        for prefix in kind.prefixes(state):
            own = {full[len(prefix) :]: value for full, value in state.items() if full.startswith(prefix)}
            yield _Found(".".join(filter(None, (name, prefix[:-1]))), kind, own)


def _choose(networks: list[_Found], dialect: str, name: str | None) -> _Found | None:
    """The one that was asked for; None: there is none of this dialect."""
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
    """What a file holds, in a line."""
    if not states:
        return f"it holds no tensors by name, but a {type(content).__name__}"
    shown = [(name, ", ".join(list(state)[:5])) for name, state in states[:5]]
    return "its tensors are " + "; ".join(f"{names}, ..." + (f" in {name!r}" if name else "") for name, names in shown)


def _check_sizes(state: State, size: int) -> None:
    """Refuses tensors that a file of `size` bytes does not hold, before anything is made for them."""
    for name, value in state.items():
        if value.is_meta:
            raise CheckpointError(f"holds no data of {name}, which was saved from the meta device")
    if sum(value.numel() * value.element_size() for value in state.values()) > 4 * size + 2**20:  # some may be shared
        largest = max(state, key=lambda name: state[name].numel())
        raise CheckpointError(f"{largest} is larger than its data")


def _filled(network: nn.Module, state: State) -> nn.Module:
    """The network, made on the meta device, with the tensors of `state`, in float32."""
    wanted = network.state_dict()
    filled = {}
    for name in wanted:
        if name not in state:
            if not name.endswith("num_batches_tracked"):  # which PyTorch has only from 0.4.1 on
                raise CheckpointError(f"it has no {name}")
            filled[name] = torch.zeros((), dtype=torch.int64, device="cpu")
    for name, value in state.items():
        if name not in wanted:
            raise CheckpointError(f"it has {name} besides")
        if value.shape != wanted[name].shape:
            raise CheckpointError(f"{name} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        if value.layout is not torch.strided or (wanted[name].is_floating_point() and not value.is_floating_point()):
            raise CheckpointError(f"{name} is of {value.dtype} and {value.layout}, not dense floating-point numbers")
    for name, value in state.items():  # of its own memory, which parameters that are trained must not share
        dtype = torch.float32 if wanted[name].is_floating_point() else wanted[name].dtype
        filled[name] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(filled, assign=True)
    return network.requires_grad_(True).eval()
