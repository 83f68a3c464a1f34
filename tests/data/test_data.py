import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgen.data import BatchSampler, DomainPair, list_datasets, load_dataset, save_grid
from fastgen.errors import DataError, FastgenError, UsageError


@pytest.mark.parametrize("name", list_datasets())
def test_bundled_data_sets_match_their_descriptions(name):
    image_size = 32
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    parts = {split: load_dataset(name, image_size, split=split) for split in ("train", "test")}
    if isinstance(parts["train"], DomainPair):
        train, test = ([part.a, part.b] for part in parts.values())
    else:
        train, test = ([part] for part in parts.values())
    for data, held in zip(train, test, strict=True):
        batch = data.all()
        assert batch.images.shape == (len(data), data.channels, image_size, image_size) and len(data) >= 80
        assert batch.images.dtype == torch.float32 and -1 <= batch.images.min() < -0.7 and 0.7 < batch.images.max() <= 1
        assert not (batch.images.flatten(1)[:, None] == held.all().images.flatten(1)[None, :2]).all(2).any()
        if data.classes is not None:
            assert batch.labels.dtype == torch.int64 and batch.labels.unique().tolist() == list(
                range(len(data.classes))
            )
        assert batch.captions is None or len(batch.captions) == len(data) == len(batch.labels)


def test_digits_are_the_uci_ones():
    pytest.importorskip("sklearn")
    train, test = load_dataset("digits", 8), load_dataset("digits", 8, split="test")
    assert (len(train), len(test)) == (1347, 450) and train.channels == 1
    both = torch.cat([train.all().images, test.all().images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797
    batch = train.batch(torch.tensor([5, 0]))
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert batch.captions == [f"a handwritten {words[label]}" for label in batch.labels]


LEVEL = 0.5 / 127.5 + 0.001  # the grey is rounded to a level of 8 bits; the weights of red, green and blue to 16


def test_held_out_colour_has_its_true_grey():
    pytest.importorskip("sklearn")
    pair = load_dataset("colour-to-grey", 32, split="test")
    red, green, blue = pair.a.all().images.unbind(1)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(pair.b.all().images, expected[:, None].expand(-1, 3, -1, -1), rtol=0, atol=LEVEL)


def test_unknown_names_and_sizes_are_named():
    with pytest.raises(UsageError, match=r"unknown data set 'digts': did you mean digits\?"):
        load_dataset("digts")
    with pytest.raises(UsageError, match="image_size must be between 1 and 4096, not 0"):
        load_dataset("digits", 0)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fastgen\[demo\]'"):
        load_dataset("digits")


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (3, 7), (8, 8), (1, 2)])
def test_every_epoch_has_every_item_once(size, batch_size):
    sampler = BatchSampler(size, batch_size, seed=0)
    drawn = torch.cat([sampler.next() for _ in range(size)])
    assert sampler.position == size * batch_size == len(drawn)
    for epoch in drawn.split(size):
        assert epoch.sort().values.tolist() == list(range(size))


def test_sampler_continues_from_its_position():
    first = BatchSampler(10, 4, seed=3)
    batches = [first.next() for _ in range(7)]
    for count in range(7):
        again = BatchSampler(10, 4, seed=3, position=count * 4)
        assert torch.equal(again.peek(), batches[count]) and torch.equal(again.next(), batches[count])
    assert not torch.equal(BatchSampler(100, 50, seed=4).next(), BatchSampler(100, 50, seed=5).next())


def test_grid_places_the_images(tmp_path):
    images = torch.full((3, 1, 2, 2), -1.0)
    images[1], images[2] = 1.0, 5.0
    save_grid(images, tmp_path / "new" / "grid.png", columns=2, padding=1)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.mode == "L" and picture.size == (7, 7)
    assert [picture.getpixel(at) for at in ((1, 1), (4, 1), (3, 1), (1, 4), (4, 4))] == [0, 255, 0, 255, 0]
    save_grid(torch.zeros(5, 3, 4, 6), tmp_path / "colour.png")
    assert Image.open(tmp_path / "colour.png").mode == "RGB"


def test_grid_names_what_it_cannot_write(tmp_path):
    with pytest.raises(UsageError, match=r"images must be .* not \(2, 2, 4, 4\)"):
        save_grid(torch.zeros(2, 2, 4, 4), tmp_path / "x.png")
    for ending in ("abc", "psd", "mpeg", ""):  # Pillow reads psd and knows mpeg by name
        with pytest.raises(UsageError, match="does not end in an image format"):
            save_grid(torch.zeros(2, 1, 4, 4), tmp_path / f"x.{ending}")
    (tmp_path / "x.xbm").write_text("mine")
    with pytest.raises(FastgenError, match=r"x\.xbm cannot be written as XBM"):
        save_grid(torch.zeros(2, 1, 4, 4), tmp_path / "x.xbm")
    assert (tmp_path / "x.xbm").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_names_the_picture(tmp_path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*full\.png'"):
        save_grid(torch.zeros(2, 1, 4, 4), tmp_path / "full.png")
