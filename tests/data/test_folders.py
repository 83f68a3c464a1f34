"""Users' own data sets, good and bad."""

import gzip
import json
import logging
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import DomainPair, folders, load_dataset
from fastgen.data.decode import read_image
from fastgen.errors import DataError, UsageError

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


@pytest.fixture
def folder(tmp_path):
    """Four images of one colour each, 1.png to 4.png, 12x10 pixels."""
    fill(tmp_path)
    return tmp_path


def fill(folder, colours=COLOURS, size=(12, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(colours, 1):
        Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(folder / f"{number}.png")


def load(folder, image_size=8, **options):
    return load_dataset(str(folder), image_size, **options)


@pytest.fixture(params=["memory", "files"])
def kept(request, monkeypatch):
    """Where the pixels are kept: small sets stay in memory, large ones are decoded when drawn."""
    if request.param == "files":
        monkeypatch.setattr(folders, "_MAX_IN_MEMORY", 0)
    return request.param


def test_a_folder_of_images(folder, kept):
    (folder / "notes.txt").write_text("mine")
    data = load(folder)
    assert (len(data), data.channels, data.image_size, data.classes) == (4, 3, 8, None)
    indices = torch.tensor([2, 0])
    data.prefetch(indices)
    data.prefetch(torch.tensor([3]))
    batch = data.batch(indices)
    expected = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])
    assert torch.equal(batch.images, expected[:, :, None, None].expand(2, 3, 8, 8))
    assert batch.labels is None and batch.captions is None


def test_a_folder_per_class_and_its_test_part(tmp_path, kept):
    fill(tmp_path / "train" / "cats", COLOURS[:1])
    fill(tmp_path / "train" / "dogs", COLOURS[1:3])
    fill(tmp_path / "val" / "cats", COLOURS[:2])
    data = load(tmp_path)
    assert data.classes == ("cats", "dogs") and data.all().labels.tolist() == [0, 1, 1]
    assert len(load(tmp_path, split="test")) == 2


def test_two_domains(tmp_path):
    fill(tmp_path / "trainA", COLOURS[:2])
    fill(tmp_path / "trainB", COLOURS)
    pair = load(tmp_path)
    assert isinstance(pair, DomainPair) and (len(pair.a), len(pair.b)) == (2, 4)
    with pytest.raises(DataError, match="testA does not exist"):
        load(tmp_path, split="test")
    fill(tmp_path / "trainB", (10, 20, 30, 40))
    pair = load(tmp_path)
    assert (pair.a.channels, pair.b.channels) == (3, 3), "grey joins colour"


def write_metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def test_captions(folder, kept):
    write_metadata(folder, {"file_name": "2.png", "text": "green"}, "", {"file_name": "1.png", "text": "red"})
    batch = load(folder).batch(torch.tensor([1, 0]))
    assert batch.captions == ["red", "green"] and batch.images[0, 0].min() == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "1.png"}, "line 2 has no text"),
        ({"file_name": "1.png", "text": " "}, "line 2 has no text"),
        ({"text": "red"}, "line 2 has no file_name"),
        ([], "line 2 has no file_name"),
        ({"file_name": "../secret.png", "text": "x"}, "which is not a file in"),
        ({"file_name": "none.png", "text": "x"}, "which is not a file in"),
        ({"file_name": "a\0b", "text": "x"}, "which is not a file in"),
        ("{", "line 2 is not JSON"),
        ("[" * 60_000, "line 2 is not JSON"),
        ("x" * 70_000, "line 2 is longer than"),
    ],
    ids=range(10),
)
def test_damaged_captions_are_named(folder, line, message):
    (folder.parent / "secret.png").write_bytes((folder / "1.png").read_bytes())
    write_metadata(folder, {"file_name": "1.png", "text": "red"}, line)
    with pytest.raises(DataError, match=message):
        load(folder)


def png(width, height, *chunks):
    """A PNG's header for an image of this size, with the given chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in (header, *chunks)
    )


DAMAGED = {
    "text": b"not an image",
    "nothing": b"",
    "bomb": png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(1000)))),
    "lesser bomb": png(9_000, 9_000, (b"IDAT", zlib.compress(bytes(1000)))),
    "text bomb": png(12, 10, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24)))),
    "no pixels": png(12, 10, (b"IDAT", b"")),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 10\n(x) print\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_named_and_left_out(folder, kept, kind, caplog):
    (folder / "2.png").write_bytes(DAMAGED[kind])
    data = load(folder)
    batch = data.batch(torch.arange(len(data)))
    assert f"left out: {folder / '2.png'}" in caplog.text and len(caplog.records) == 1
    stands_in = kept == "files" and kind == "no pixels"  # every other fault shows in the header, before drawing
    assert batch.images[:, 1].mean((1, 2)).tolist() == ([-1, -1, -1, 1] if stands_in else [-1, -1, 1])
    with pytest.raises(DataError, match=r"2\.png is"):
        load(folder, strict=True).all()


def test_a_replacement_has_its_own_label_and_caption(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folders, "_MAX_IN_MEMORY", 0)
    fill(tmp_path / "a", COLOURS[:1])
    fill(tmp_path / "b", COLOURS[1:3])
    data = load(tmp_path)
    (tmp_path / "a" / "1.png").unlink()  # deleted during training
    fill(tmp_path / "b", COLOURS[1:2], size=(3, 3))
    assert data.batch(torch.tensor([0, 2])).labels.tolist() == [1, 1]
    assert [record.message.split("/")[-1][:21] for record in caplog.records] == [
        "1.png no longer exist", "1.png is 3x3 pixels: ",
    ]  # fmt: skip
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 3 images"):
        data.batch(torch.tensor([0]))


def test_unusable_folders_say_what_they_hold(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images: it holds nothing"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "a.doc").write_text("")
    with pytest.raises(DataError, match=r"it holds 1 file \(\.doc\)"):
        load(tmp_path / "empty")
    fill(tmp_path / "mixed")
    fill(tmp_path / "mixed" / "more")
    with pytest.raises(
        DataError, match=r"mixes images and folders of images: it holds 4 files \(\.png\), 1 folder \(more\)"
    ):
        load(tmp_path / "mixed")
    fill(tmp_path / "one", COLOURS[:1])
    with pytest.raises(DataError, match="one holds a single image"):
        load(tmp_path / "one")
    fill(tmp_path / "classes" / "a")
    (tmp_path / "classes" / "b").mkdir()
    with pytest.raises(DataError, match="one folder per class, but b holds no image"):
        load(tmp_path / "classes")
    with pytest.raises(DataError, match="no test part"):
        load(tmp_path / "one", split="test")
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"1\.png is not a folder"):
        load(tmp_path / "one" / "1.png")
    with pytest.raises(UsageError, match="split must be"):
        load(tmp_path / "one", split="best")


def test_images_that_are_too_small_are_left_out_before_training(folder, kept, caplog):
    fill(folder, COLOURS[:1], size=(9, 12))
    data = load(folder, 10)
    assert "left out: " in caplog.text and "1.png is 9x12 pixels: too small for images of 10x10" in caplog.text
    assert data.all().images[:, 0].mean((1, 2)).tolist() == [-1, -1, 1] and len(caplog.records) == 1
    with pytest.raises(DataError, match=r"1\.png is 9x12 pixels: too small"):
        load(folder, 10, strict=True)
    with pytest.raises(
        DataError, match=r"fewer than 2 of the images in .* can be used: .*1\.png is 9x12 pixels: too small"
    ):
        load(folder, 11)


def test_of_many_that_are_left_out_some_are_named(tmp_path, kept, caplog):
    fill(tmp_path, COLOURS[:3] * 10, size=(9, 9))
    fill(tmp_path, COLOURS[:2])
    assert len(load(tmp_path, 10)) == 2 and len(caplog.records) == 21 and "more than 20 images" in caplog.text


def test_grey_stays_grey_and_joins_colour(tmp_path):
    fill(tmp_path, (0, 255))
    assert load(tmp_path).channels == 1
    Image.new("RGB", (9, 9), "red").save(tmp_path / "3.png")
    assert load(tmp_path).channels == 3


def test_pixels_are_upright_whole_and_on_white(tmp_path):
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[0], np.rot90(picture, -1))
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png", 3) == 255).all()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "c.png")
    assert (read_image(tmp_path / "c.png", 3) == 255).all()


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_mnist(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    labels = np.array([7, 0, 9], np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte does not"):
        load(tmp_path)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    batch = load(tmp_path, 28).all()
    assert torch.equal(batch.images[:, 0], torch.from_numpy(images).float() / 127.5 - 1)
    assert batch.labels.tolist() == [7, 0, 9] and batch.captions[0] == "a handwritten seven"
    assert load(tmp_path, 32).all().images.shape == (3, 1, 32, 32)
    for content, message in (
        (idx(labels + 3), "must be 0 to 9, but run from 3 to 12"),
        (idx(labels[:2]), "3 images, but 2 labels"),
        (idx(labels)[:-1], r"says \[3\] values, but it holds 2"),
        (idx(images), "not an IDX file of bytes in 1 dimensions"),
        (b"", "not an IDX file"),
    ):
        (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=message):
            load(tmp_path)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels))[:-9])
    with pytest.raises(DataError, match=r"ubyte\.gz is damaged"):
        load(tmp_path)


def test_cifar10(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(10, -1)], 1)
    for kind in ("bin", "py"):
        (tmp_path / kind).mkdir()
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        (tmp_path / "bin" / f"data_batch_{number + 1}.bin").write_bytes(records[part].tobytes())
        batch = {b"data": pixels[part].reshape(2, -1), b"labels": labels[part].tolist()}
        (tmp_path / "py" / f"data_batch_{number + 1}").write_bytes(pickle.dumps(batch, 3))
    for kind in ("bin", "py"):
        batch = load(tmp_path / kind, 32).all()
        assert torch.equal(batch.images, torch.from_numpy(pixels).float() / 127.5 - 1)
        assert batch.labels.tolist() == list(range(10)) and batch.captions[0] == "a photo of an airplane"
    batch = {b"data": pixels[:2].reshape(2, -1) / 255, b"labels": [0, 1]}
    (tmp_path / "py" / "data_batch_2").write_bytes(pickle.dumps(batch, 3))
    with pytest.raises(DataError, match=r"data_batch_2 is not a batch of CIFAR-10: its pixels are float64"):
        load(tmp_path / "py")
    (tmp_path / "bin" / "data_batch_3.bin").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"data_batch_3\.bin is damaged: 9 bytes"):
        load(tmp_path / "bin")


class Hostile:
    def __reduce__(self):
        return (logging.getLogger("hostile").critical, ("ran",))


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), pickle.dumps({b"data": [1]}), b"", b"\x80\x04."])
def test_a_pickle_calls_nothing(tmp_path, content, caplog):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}").write_bytes(content)
    with pytest.raises(DataError, match=r"it is not opened|is not a batch of CIFAR-10"):
        load(tmp_path)
    assert not caplog.records
