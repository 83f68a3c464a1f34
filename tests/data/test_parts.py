"""The held-out part has the same classes, domains and channels as the training part."""

import copy
import json
import os
import pickle

import pytest
import torch

from fastgen.data import folders, load_dataset
from fastgen.data.folders import NoTestPartError
from fastgen.errors import DataError
from tests.data.test_folders import COLOURS, fill, load


def test_held_out_classes_have_the_numbers_that_training_gave_them(tmp_path):
    for name in ("a", "b", "c"):
        fill(tmp_path / "train" / name)
    fill(tmp_path / "test" / "c", COLOURS[:1])
    fill(tmp_path / "test" / "b", COLOURS[:2])
    held = load(tmp_path, split="test")
    assert held.classes == ("a", "b", "c") and held.labels.tolist() == [1, 1, 2]
    fill(tmp_path / "test" / "B")
    with pytest.raises(DataError, match=r"test has a class 'B', but .*train does not: did you mean 'b'\?"):
        load(tmp_path, split="test")


@pytest.mark.parametrize("names", [("Train", "TEST"), ("TRAIN", "Val"), ("train", "valid"), ("train", "Validation")])
def test_parts_are_found_in_any_case(tmp_path, names):
    train, test = names
    fill(tmp_path / train / "a")
    fill(tmp_path / train / "b")
    fill(tmp_path / test / "b")
    assert len(load(tmp_path)) == 8 and load(tmp_path, split="test").labels.tolist() == [1] * 4


def test_domains_are_found_in_any_case_and_have_the_channels_of_training(tmp_path):
    fill(tmp_path / "TrainA", (10, 20))
    fill(tmp_path / "trainb", (30, 40))
    with pytest.raises(NoTestPartError, match="testA does not exist"):
        load(tmp_path, split="test")
    fill(tmp_path / "testA")
    with pytest.raises(DataError, match="testB does not exist") as raised:
        load(tmp_path, split="test")
    assert not isinstance(raised.value, NoTestPartError)
    fill(tmp_path / "TESTB", (50, 60))
    pair = load(tmp_path, split="test")
    assert (pair.a.channels, pair.b.channels) == (1, 1) and (len(pair.a), len(pair.b)) == (4, 2)
    fill(tmp_path / "trainb")
    pair = load(tmp_path, split="test")
    assert (pair.a.channels, pair.b.channels) == (3, 3)


def test_a_held_out_part_with_less_information_is_an_error(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    (tmp_path / "train" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{number}.png", "text": "x"}) + "\n" for number in (1, 2))
    )
    with pytest.raises(DataError, match=r"train has captions, but .*test has none: it needs a metadata\.jsonl"):
        load(tmp_path, split="test")
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    fill(tmp_path / "train" / "a")
    with pytest.raises(DataError, match=r"train has one folder per class, but .*test does not"):
        load(tmp_path, split="test")


def test_ambiguous_names(tmp_path, caplog):
    for name in ("bus", "train"):
        fill(tmp_path / name, COLOURS[:2])
    assert len(load(tmp_path)) == 2 and "only train is used for training, and bus is ignored" in caplog.text
    fill(tmp_path / "Train")
    with pytest.raises(DataError, match="holds Train and train: keep one"):
        load(tmp_path)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A data set that is decoded when drawn."""
    monkeypatch.setattr(folders, "_MAX_IN_MEMORY", 0)
    fill(tmp_path)
    return load(tmp_path)


def reds(data):
    return data.batch(torch.tensor([0, 1, 3])).images[:, 0].mean((1, 2)).tolist()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda data: pickle.loads(pickle.dumps(data))])
def test_files_can_be_copied(files, copied):
    files.prefetch(torch.tensor([0]))
    assert reds(copied(files)) == reds(files) == [1, -1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_can_be_read_after_a_fork(files):
    assert reds(files) == [1, -1, 1]  # starts its threads
    files.prefetch(torch.tensor([0]))
    child = os.fork()
    if not child:
        os._exit(0 if reds(files) == [1, -1, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0 and reds(files) == [1, -1, 1]


def test_none_of_the_images_asked_for(files):
    assert files.batch(torch.tensor([], dtype=torch.int64)).images.shape == (0, 3, 8, 8)


def test_defaults_of_the_process_change_no_data(tmp_path):
    fill(tmp_path / "train" / "a")
    fill(tmp_path / "test" / "a")

    def everything():
        sets = [load(tmp_path), load(tmp_path, split="test")]
        for name in ("digits", "textures", "photos", "faces", "colour-to-grey"):
            found = load_dataset(name, 32)
            sets += [found.a, found.b] if hasattr(found, "a") else [found]
        return [data.all() for data in sets]

    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    expected = everything()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for batch, reference in zip(found, expected, strict=True):
        assert batch.images.dtype == torch.float32 and torch.equal(batch.images, reference.images)
        assert reference.labels is None or (
            batch.labels.dtype == torch.int64 and torch.equal(batch.labels, reference.labels)
        )
