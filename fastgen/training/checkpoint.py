"""A checkpoint is `checkpoint.json` and the safetensors file that it names, with that file's size and SHA-256.

Both are written under temporary names, synced and renamed; renaming the JSON commits the checkpoint. The name of the
tensors' file has their hash, so a checkpoint never overwrites the previous one, and a process that is killed at any
moment leaves one that loads.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastgen.errors import CheckpointError, naming

NAME = "checkpoint.json"
_FORMAT = 1
_MAX_JSON_BYTES = 1 << 20
_TENSOR_FILE = re.compile(r"checkpoint-\d{6,}-[0-9a-f]{12}\.safetensors")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes the checkpoint of `step`, then removes the previous one."""
    # safetensors refuses tensors that share memory, so each is cloned
    blob = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    digest = hashlib.sha256(blob).hexdigest()
    tensor_file = f"checkpoint-{step:06d}-{digest[:12]}.safetensors"
    for left_behind in folder.glob(".tmp-*.safetensors"):  # by a killed run; no other process writes here now
        left_behind.unlink(missing_ok=True)
    write_atomically(folder / tensor_file, blob)
    entry = {"file": tensor_file, "bytes": len(blob), "sha256": digest}
    document = {"format": _FORMAT, "step": step, **meta, "tensors": entry}
    write_atomically(folder / NAME, json.dumps(document, indent=2).encode())
    for path in folder.iterdir():
        if _TENSOR_FILE.fullmatch(path.name) and path.name != tensor_file:
            path.unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The results of `load_meta` and `load_tensors`, of one step even while a run writes to the folder.

    Raises:
        CheckpointError: as they do.
    """
    while True:
        meta = load_meta(folder)
        try:
            return meta, load_tensors(folder, meta)
        except CheckpointError:
            if load_meta(folder)["tensors"] == meta["tensors"]:
                raise


def load_meta(folder: Path) -> dict[str, Any]:
    """The JSON part; only `step` and `tensors` are checked, the caller checks the rest.

    Raises:
        CheckpointError: missing, unreadable, or not a checkpoint of this format.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large for the description of a checkpoint")
        meta = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no checkpoint ({NAME} is missing)") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a fastgen checkpoint of format {_FORMAT}")
    entry, step = meta.get("tensors"), meta.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        raise CheckpointError(f"{path} is damaged: step is not a number of steps")
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise CheckpointError(f"{path} is damaged: it names no tensor file")
    if not _TENSOR_FILE.fullmatch(entry["file"]):
        raise CheckpointError(f"{path} names {entry['file']!r}, which is not a checkpoint's tensor file")
    return meta


def load_tensors(folder: Path, meta: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that `meta` names, on the CPU, after checking their size and hash.

    Raises:
        CheckpointError: missing, truncated or corrupted.
    """
    entry = meta["tensors"]
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"{path} is truncated or changed: it has {size} bytes, not {entry.get('bytes')}")
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(blob).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path} is corrupted: its SHA-256 does not match")
    try:
        return safetensors.torch.load(blob)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it to disk and renames it over `path`."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # syncing the folder puts the rename itself on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
