"""The training loop: each system's step beside its modules unfused, what the loop adds to a step, and how fast files
load."""

import contextlib

import pytest
import torch
from PIL import Image

from fastgen.data import BatchSampler, ImageDataset, load_dataset, read_image
from fastgen.data.files import ImageFiles, LeftOut
from fastgen.inference._record import unfused  # not public: users have no need to run layers one by one
from fastgen.training import CONFIGS
from fastgen.training.config import DCGANTraining
from fastgen.training.loop import mean_losses
from fastgen.training.recipes import RECIPES

TABLE = "Training loop, DCGAN-64, batch 64"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """512 photo patches of 178x178 as JPEG files, decoded to 64x64 on demand, as in a large folder."""
    path = tmp_path_factory.mktemp("photos")
    images = load_dataset("photos", 178)
    for i in range(512):
        pixels = images.batch(torch.tensor([i % len(images)])).images[0]
        array = ((pixels.permute(1, 2, 0) + 1) * 127.5).byte().numpy()
        Image.fromarray(array).save(path / f"{i:03d}.jpg", quality=90)
    return ImageDataset("photos", ImageFiles(sorted(path.iterdir()), 3, 64, LeftOut(strict=True)))


def recipe(data, config=None):
    config = config or DCGANTraining(image_size=64, ngf=64, ndf=64, batch_size=64, augment="", r1_gamma=0.0)
    torch.manual_seed(0)
    return RECIPES[config.system](config, data, torch.device("cpu"), torch.Generator().manual_seed(0))


def facts(found, exact):
    error = (found - exact).abs().max().item()
    return {"correct": error < 1e-5, "error": error}


@pytest.mark.parametrize("system", RECIPES)
def test_systems(system, measure):
    """A step of `fastgen train SYSTEM` with its defaults, beside the same modules unfused."""
    config = CONFIGS[system]()
    data = load_dataset(config.data, config.image_size)
    calls, losses = {}, {}
    for column in ("unfused", "fastgen"):
        trained = recipe(data, config)

        def step(trained=trained, plain=column == "unfused"):
            with unfused(trained.model) if plain else contextlib.nullcontext():
                return trained.advance(1)

        losses[column] = torch.stack([*step().values()])
        calls[column] = step
    error = ((losses["fastgen"] - losses["unfused"]).abs().max() / losses["unfused"].abs().max()).item()
    close = {"error": error, "correct": error < 1e-3}
    row = f"{system}, {config.image_size}x{config.image_size}, batch {config.batch_size}"
    measure(calls, dict.fromkeys(calls, close), table="A system's training step, its defaults", row=row)


def test_overhead(measure):
    """Everything that the loop does around forward, backward and optimizer: the next batch, averaged weights, losses
    for the log."""
    data = load_dataset("photos", 64)
    trained = recipe(data)
    (batch,) = trained.next_batches()
    same = facts(batch.images, data.all().images[BatchSampler(len(data), 64, 0).next()])
    losses = trained.step(0)

    def rest():
        trained.next_batches()
        trained.ema.update(1)
        mean_losses([losses], 1)

    calls = {"step": lambda: trained.advance(1), "fastgen rest": rest}
    measure(calls, dict.fromkeys(calls, same), table=TABLE, row="what surrounds a step")


def test_loader(photos, measure):
    """Decoding and resizing a batch of images without prefetching, beside the training step that uses it."""
    trained = recipe(photos)
    sampler = BatchSampler(len(photos), 64, 0)
    indices = sampler.peek()
    pixels = [torch.from_numpy(read_image(photos.images.paths[i], 3, image_size=64)) for i in indices.tolist()]
    same = facts(photos.batch(indices).images, torch.stack(pixels).float() / 127.5 - 1)
    calls = {"step": lambda: trained.advance(0), "fastgen loader": lambda: photos.batch(sampler.next())}
    measure(calls, dict.fromkeys(calls, same), table=TABLE, row="a batch of images")
