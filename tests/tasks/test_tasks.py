"""The tasks, with small models for which the right answer is known."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, conv2d, interpolate, mse_loss, pad

import fastgen
from fastgen import tasks
from fastgen.data import save_animation
from fastgen.errors import DataError, FastgenError, UsageError
from fastgen.tasks.draw import slerp
from fastgen.tasks.translate import in_tiles
from tests.support.tolerance import UNIT_ROUNDOFF, units


class LinearVAE:
    """Images of 8x8 pixels that are sums of six smooth waves: for each task the best answer is known."""

    config = SimpleNamespace(image_size=8, channels=1)
    log_std = torch.tensor(-4.0)

    def __init__(self):
        at = (torch.arange(8) + 0.5) / 8
        waves = [torch.cos(torch.pi * k * at) for k in range(3)]
        basis = torch.stack([torch.outer(a, b) for a in waves for b in waves][:6]).flatten(1)
        self.basis = 0.25 * basis / basis.square().mean(1, keepdim=True).sqrt()

    def encode(self, images):
        mu = images.flatten(1) @ torch.linalg.pinv(self.basis)
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        return (z @ self.basis).view(-1, 1, 8, 8)


@pytest.fixture
def vae():
    return LinearVAE()


@pytest.fixture
def images(vae):
    return vae.decode(torch.randn(16, 6, generator=torch.Generator().manual_seed(0))) / 4


EXACT = 64 * UNIT_ROUNDOFF[torch.float32]  # a projection: a few roundings of pixels between -1 and 1
DESCENDED = 0.01  # of pixels: the distance from the best latent after the default number of steps
FILLED = 0.02  # the same for pixels that were masked


def test_reconstruct_keeps_what_the_model_knows(vae, images):
    torch.testing.assert_close(tasks.reconstruct(vae, images), images, rtol=0, atol=EXACT)


def test_denoise_removes_the_noise(vae, images):
    noisy = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    found = tasks.denoise(vae, noisy, std=0.5)
    # the best linear estimate of the six numbers, which are N(0, 1)
    gram = vae.basis @ vae.basis.T + 0.25 * torch.eye(6)
    best = vae.decode(torch.linalg.solve(gram, vae.basis @ noisy.flatten(1).T).T)
    torch.testing.assert_close(found, best, rtol=0, atol=DESCENDED)
    assert mse_loss(found, images) < mse_loss(noisy, images) / 5
    assert found.requires_grad is False
    with pytest.raises(UsageError, match="std must be between 0 and 2, not 3"):
        tasks.denoise(vae, noisy, std=3)


def test_inpaint_fills_what_is_missing_and_keeps_the_rest(vae, images):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3:] = True
    holed = images.masked_fill(mask, float("nan"))
    found = tasks.inpaint(vae, holed, mask)
    assert torch.equal(found[:, :, ~mask], images[:, :, ~mask])
    torch.testing.assert_close(found, images, rtol=0, atol=FILLED)
    one_each = mask.expand(16, 1, 8, 8).clone()
    one_each[1:] = False
    assert torch.equal(tasks.inpaint(vae, images, one_each)[1:], images[1:])
    with pytest.raises(UsageError, match="mask must leave at least one pixel"):
        tasks.inpaint(vae, images, torch.ones(8, 8))
    with pytest.raises(UsageError, match=r"mask must be \(8, 8\) or \(16, 1, 8, 8\), not \(4, 4\)"):
        tasks.inpaint(vae, images, torch.ones(4, 4))


def test_upscale_keeps_the_means_and_beats_bicubic(vae, images):
    small = avg_pool2d(images, 2)
    found = tasks.upscale(vae, small)
    torch.testing.assert_close(avg_pool2d(found, 2), small, rtol=0, atol=EXACT)
    bicubic = interpolate(small, size=(8, 8), mode="bicubic")
    assert mse_loss(found, images) < mse_loss(bicubic, images) / 10
    for shape in ((8, 8), (3, 3), (4, 2)):
        with pytest.raises(UsageError, match="images must be square, of 8 pixels divided by 2, 3"):
            tasks.upscale(vae, torch.zeros(1, 1, *shape))


class Drawer:
    """A generator whose images show their latent and the requested class."""

    def latent(self, n, *, generator=None):
        return torch.randn(n, 4, generator=generator)

    def generate(self, z, labels=None):
        return (z if labels is None else z * 0 + labels[:, None]).view(-1, 1, 2, 2)

    def sample(self, n, *, generator=None):
        return self.generate(self.latent(n, generator=generator))


class ClassDrawer(Drawer):
    def sample(self, n, *, generator=None, labels=None):
        return self.generate(self.latent(n, generator=generator), labels)


ANGLES = units(torch.float32, 2**13, 2**13)  # the arc cosine of a number near 1 loses half the digits


def test_interpolation_goes_through_its_points_in_equal_steps():
    def seeded():
        return torch.Generator().manual_seed(3)

    ends = Drawer().latent(3, generator=seeded())
    frames = tasks.interpolate(Drawer(), 9, points=3, generator=seeded()).flatten(1)
    torch.testing.assert_close(frames[::4], ends)
    angles = torch.nn.functional.cosine_similarity(frames[:4], frames[1:5]).acos()
    torch.testing.assert_close(angles, angles[:1].expand(4), **ANGLES)
    circle = tasks.interpolate(Drawer(), 12, points=3, closed=True, generator=seeded()).flatten(1)
    torch.testing.assert_close(circle[::4], ends)
    steps = (circle - circle.roll(-1, 0)).norm(dim=1)
    assert steps[-1] < 2 * steps.mean(), "from the last image it is one step to the first"
    assert (tasks.interpolate(ClassDrawer(), 4, label=7) == 7).all()
    for frames, points in ((1, 2), (5, 1), (3, 4)):
        with pytest.raises(UsageError, match="frames must be"):
            tasks.interpolate(Drawer(), frames, points=points)
    with pytest.raises(UsageError, match="draws with labels: say which"):
        tasks.interpolate(ClassDrawer(), 4)


def test_interpolation_between_parallel_vectors_is_linear():
    a, share = torch.ones(3, 4), torch.tensor([[0.25], [0.25], [0.5]])
    found = slerp(a, a * torch.tensor([[1.0], [2.0], [-1.0]]), share)
    torch.testing.assert_close(found, torch.tensor([[1.0], [1.25], [0.0]]).expand(3, 4))


def test_conditions_that_the_model_does_not_have():
    assert tasks.conditions(ClassDrawer(), 3, label=2)["labels"].tolist() == [2, 2, 2]
    assert tasks.conditions(Drawer(), 3) == {}
    for options, message in (({"label": 1}, "a class was given"), ({"text": "x"}, "a text was given")):
        with pytest.raises(UsageError, match=message):
            tasks.conditions(Drawer(), 3, **options)


def test_an_animation_holds_every_image(tmp_path):
    save_animation(torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 6), tmp_path / "a.gif", milliseconds=40)
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["duration"]) == (5, (6, 4), 40)
    with pytest.raises(UsageError, match=r"must end in \.gif"):
        save_animation(torch.zeros(2, 1, 4, 4), tmp_path / "a.png")


class Blur:
    """Translates by a local mean over 9 pixels, at a stride of 4 like a network with two strided layers."""

    config = SimpleNamespace()

    def translate(self, images, direction):
        kernel = torch.ones(3, 1, 9, 9) / 81
        small = conv2d(pad(images, (4, 4, 4, 4), "reflect"), kernel, stride=4, groups=3)
        return interpolate(small, scale_factor=4) * (1 if direction == "a_to_b" else -1)


@pytest.mark.parametrize("size", [(96, 140), (64, 64), (65, 200), (5, 7), (301, 63)])
def test_tiles_give_what_the_whole_gives(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    height, width = size
    whole = Blur().translate(pad(images, (0, -width % 4, 0, -height % 4), "replicate"), "b_to_a")[:, :, :height, :width]
    tiled = tasks.translate(Blur(), images, "b_to_a", tile=64, overlap=32)
    torch.testing.assert_close(tiled, whole)


def test_tiles_of_different_brightness_fade_into_each_other():
    shades = iter(torch.linspace(-1, 1, 3))
    drawn = in_tiles(lambda part: part * 0 + next(shades), torch.zeros(1, 1, 64, 160), 64, 16)
    steps = drawn.diff(dim=3).abs()
    assert drawn.min() == -1 and drawn.max() == 1 and 0 < steps.max() < 1 / 6, "1 apart, over 8 pixels or more"
    with pytest.raises(UsageError, match="tile must be a multiple of 4 and at least twice overlap, not 30"):
        in_tiles(lambda part: part, torch.zeros(1, 1, 64, 64), 30, 8, 4)
    with pytest.raises(UsageError, match="does not translate"):
        tasks.translate(Drawer(), torch.zeros(1, 3, 8, 8))


def test_pictures_of_a_folder(tmp_path, caplog):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(source / "a.png")
    Image.new("RGB", (3, 5), (0, 0, 255)).save(source / "a.bmp")
    Image.new("L", (2, 2), 255).save(source / "b.png")
    (source / "c.png").write_bytes(b"no picture")

    def negative(image):
        return -image

    written = tasks.transform_pictures(source, out, negative, 3)
    assert [path.name for path in written] == ["a.bmp.png", "a.png.png"]
    assert "b.png is grey, but the model needs colour" in caplog.text
    with pytest.raises(DataError, match=r"b\.png is grey, but the model needs colour"):
        tasks.transform_pictures(source, out, negative, 3, strict=True)
    written = tasks.transform_pictures(source, out, negative, 3, grey_as_colour=True)
    assert [path.name for path in written] == ["a.bmp.png", "a.png.png", "b.png"] and "left out" in caplog.text
    with Image.open(out / "a.png.png") as picture:
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (0, 255, 255)
    (single,) = tasks.transform_pictures(source / "a.png", out, negative, 1, image_size=4)
    with Image.open(single) as picture:
        assert picture.size == (4, 4) and picture.mode == "L"
    for arguments, message in (
        ((source, source), "write to another folder"),
        ((tmp_path / "none", out), "does not exist"),
        ((tmp_path, out), "holds no pictures"),
        ((source / "c.png", out), "not an image"),
    ):
        with pytest.raises(DataError, match=message):
            tasks.transform_pictures(*arguments, negative, 3)
    with pytest.raises(DataError, match=r"c\.png is not an image"):
        tasks.transform_pictures(source, out, negative, 3, grey_as_colour=True, strict=True)


def test_a_picture_that_fails_leaves_the_others(tmp_path, caplog):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, size in (("a", (3, 9)), ("b", (9, 9)), ("c", (2, 2))):
        Image.new("L", size).save(source / f"{name}.png")

    def reflect(image):
        return pad(image, (3, 3, 3, 3), "reflect")

    (written,) = tasks.transform_pictures(source, out, reflect, 1)
    assert written.name == "b.png" and "a.png: RuntimeError: " in caplog.text and "c.png: " in caplog.text
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        tasks.transform_pictures(source, out, reflect, 1, strict=True)
    (source / "b.png").unlink()
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):  # as for any function that fails
        tasks.transform_pictures(source, out, reflect, 1)
    with pytest.raises(FastgenError, match="not finite"):
        tasks.transform_pictures(source, out, lambda image: image / 0, 1)

    def wrong(image):
        raise UsageError("tile must be")

    with pytest.raises(UsageError, match="tile must be"):
        tasks.transform_pictures(source, out, wrong, 1)


class Picky:
    """A network that accepts the same sizes as a ResNet."""

    config = SimpleNamespace(generator="resnet")

    def translate(self, images, direction):
        assert all(side % 4 == 0 and side >= 8 for side in images.shape[2:])
        return images


@pytest.mark.parametrize("size", [(1, 1), (3, 100), (70, 2), (4, 4), (9, 12)])
def test_thin_pictures_are_continued_and_cut(size):
    images = torch.rand(1, 3, *size)
    torch.testing.assert_close(tasks.translate(Picky(), images, tile=64, overlap=32), images)
    with pytest.raises(UsageError, match="tile must be a multiple of 4 from 8"):
        tasks.translate(Picky(), images, tile=4, overlap=0)


def test_classes_and_defaults(vae, images):
    for label in (-1, 10, 2**70):
        with pytest.raises(UsageError, match=f"the class must be between 0 and 9, not {label}"):
            tasks.conditions(
                SimpleNamespace(sample=ClassDrawer().sample, config=SimpleNamespace(classes=10)), 2, label=label
            )
    whole = torch.rand(1, 3, 40, 40)

    def results():
        with torch.inference_mode():
            return [
                tasks.denoise(vae, images, std=0.5, steps=3), tasks.upscale(vae, avg_pool2d(images, 2), steps=3),
                tasks.inpaint(vae, images, images[0, 0] > 0, steps=3), tasks.translate(Picky(), whole, tile=16,
                overlap=8), tasks.conditions(ClassDrawer(), 3, label=2)["labels"],
            ]  # fmt: skip

    expected = results()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for actual, expected_value in zip(found, expected, strict=True):
        assert actual.dtype == expected_value.dtype and torch.equal(actual, expected_value)


def test_a_model_in_training_is_used_as_in_evaluation():
    """Its batch norms keep their statistics, and an image does not depend on the others."""
    model = fastgen.create_model("vae", image_size=16, channels=1, widths=(4, 8), nz=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, mask = torch.rand(3, 1, 16, 16) * 2 - 1, torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    for use in (
        lambda x: tasks.reconstruct(model, x),
        lambda x: tasks.denoise(model, x, std=0.1, steps=2),
        lambda x: tasks.inpaint(model, x, mask, steps=2),
        lambda x: tasks.upscale(model, x[:, :, ::4, ::4], steps=2),
    ):
        torch.testing.assert_close(use(images)[:1], use(images[:1]))
    tasks.interpolate(model, 3)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_empty_images():
    model = fastgen.create_model("vae", image_size=16, channels=1, widths=(4, 8), nz=4)
    with pytest.raises(UsageError, match=r"images must be square, of 16 pixels .* not 0x0"):
        tasks.upscale(model, torch.zeros(1, 1, 0, 0))
    with pytest.raises(UsageError, match=r"with C, H and W above 0, got shape \(1, 1, 0, 5\)"):
        in_tiles(lambda x: x, torch.zeros(1, 1, 0, 5), 8, 0)
