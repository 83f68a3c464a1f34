import errno
import json
import os

import pytest
import torch

from fastgen.errors import CheckpointError
from fastgen.training import checkpoint


@pytest.fixture
def tensors():
    shared = torch.arange(6.0)
    return {"a": shared.view(2, 3).T, "b": shared[:2], "count": torch.tensor(3), "bytes": torch.arange(4).byte()}


def tensor_files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def load(folder):
    meta = checkpoint.load_meta(folder)
    return meta, checkpoint.load_tensors(folder, meta)


def test_round_trip_keeps_one_tensor_file(tmp_path, tensors):
    checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
    checkpoint.save_checkpoint(tmp_path, 2, tensors, {"position": 7})
    meta, loaded = load(tmp_path)
    assert meta["step"] == 2 and meta["position"] == 7
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in loaded
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [meta["tensors"]["file"], "checkpoint.json"]


@pytest.mark.parametrize("dies_at", [1, 2])
def test_killed_between_the_renames_leaves_the_previous_checkpoint(tmp_path, tensors, monkeypatch, dies_at):
    checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2 * dies_at - 1:  # a file and its folder are synced alternately
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, 2, {"a": torch.zeros(9)}, {})
    monkeypatch.undo()
    meta, loaded = load(tmp_path)
    assert meta["step"] == 1 and torch.equal(loaded["a"], tensors["a"])
    checkpoint.save_checkpoint(tmp_path, 2, tensors, {})
    assert len(tensor_files(tmp_path)) == 1, "what the kill left is swept up"


def test_full_disk_names_the_file_and_leaves_the_previous_checkpoint(tmp_path, tensors, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 1, tensors, {})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint-000002-.*\.safetensors'"):
        checkpoint.save_checkpoint(tmp_path, 2, tensors, {})
    assert load(tmp_path)[0]["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file stays"


def test_leftovers_of_a_killed_run_are_removed(tmp_path, tensors):
    (tmp_path / ".tmp-1-checkpoint-000001-0123456789ab.safetensors").write_bytes(b"half")
    checkpoint.save_checkpoint(tmp_path, 2, tensors, {})
    assert len(list(tmp_path.iterdir())) == 2


def test_loading_while_a_run_saves_gives_one_step(tmp_path, tensors, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
    load_tensors = checkpoint.load_tensors

    def overtaken(folder, meta):
        if meta["step"] == 1:
            checkpoint.save_checkpoint(tmp_path, 2, {"a": torch.ones(1)}, {})
        return load_tensors(folder, meta)

    monkeypatch.setattr(checkpoint, "load_tensors", overtaken)
    meta, loaded = checkpoint.load(tmp_path)
    assert meta["step"] == 2 and loaded["a"] == 1


def test_truncated_corrupted_and_missing_tensors_are_told_apart(tmp_path, tensors):
    checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
    path = tmp_path / tensor_files(tmp_path)[0]
    blob = path.read_bytes()
    path.write_bytes(blob[:-5])
    with pytest.raises(CheckpointError, match=rf"truncated .*: it has {len(blob) - 5} bytes, not {len(blob)}"):
        load(tmp_path)
    path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="corrupted"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_a_file_that_matches_its_hash_but_is_not_safetensors(tmp_path, tensors, monkeypatch):
    for blob in (b"", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"[[[[[[[["):
        monkeypatch.setattr("safetensors.torch.save", lambda tensors, blob=blob: blob)
        checkpoint.save_checkpoint(tmp_path, 1, tensors, {})
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            load(tmp_path)


GOOD = {"format": 1, "step": 0, "tensors": {"file": "checkpoint-000000-0123456789ab.safetensors"}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "[" * 100_000,
        "\xff\xfe".encode("latin1"),
        '{"format": 1' + " " * (1 << 20) + "}",
        '{"format": ' + "9" * 5000 + "}",
        json.dumps({**GOOD, "format": 2}),
        json.dumps({**GOOD, "step": -1}),
        json.dumps({**GOOD, "step": 2**63}),
        json.dumps({**GOOD, "step": True}),
        json.dumps({**GOOD, "step": "1"}),
        json.dumps({**GOOD, "tensors": None}),
        json.dumps({**GOOD, "tensors": {"file": 3}}),
        json.dumps({**GOOD, "tensors": {"file": "../../etc/passwd"}}),
        json.dumps({**GOOD, "tensors": {"file": "/dev/zero"}}),
        json.dumps({**GOOD, "tensors": {"file": GOOD["tensors"]["file"] + "\n"}}),
    ],
    ids=range(18),
)
def test_hostile_json_is_a_clear_error(tmp_path, text):
    (tmp_path / "checkpoint.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load(tmp_path)
