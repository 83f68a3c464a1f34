"""Figures of models for which the right values are known, and the page that shows them."""

import base64
import dataclasses
import functools
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from fastgen.data import load_dataset
from fastgen.data.bundled import to_grey
from fastgen.metrics import Figure, PCAGaussian, train_classifier
from fastgen.training import CONFIGS, evaluation
from fastgen.training.evaluation import Evaluation, evaluate_model, psnr
from fastgen.training.plot import plot_losses
from fastgen.training.report import write_report

SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def quick_classifiers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "train_classifier", functools.partial(train_classifier, steps=30))
        evaluation._real.cache_clear()
        yield
    evaluation._real.cache_clear()


def config(system, **options):
    return CONFIGS[system](**options, image_size=SIZE) if system != "cgan" else CONFIGS[system](**options)


class Light(torch.nn.Module):
    """A discriminator that rates an image as more real, the brighter it is and the higher its class."""

    def forward(self, images, labels):
        return images.mean((1, 2, 3)) + labels


class RealDigits:
    """Draws real digits of the requested class, or of the next one."""

    config = SimpleNamespace(classes=10)
    discriminator = Light()

    def __init__(self, image_size, off_by=0):
        self.batch = load_dataset("digits", image_size).all()
        self.off_by = off_by

    def sample(self, n, *, generator, labels):
        weights = torch.eye(10)[(labels + self.off_by) % 10] @ torch.eye(10)[self.batch.labels].T
        return self.batch.images[torch.multinomial(weights, 1, generator=generator)[:, 0]]


def test_real_images_have_the_figures_of_real_images():
    real = RealDigits(32)
    result = evaluate_model(real, config("cgan"), 300, 0)
    assert result.recognised.n == 300 and result.recognised.share > 0.9
    assert result.figures["as_asked"].value > 0.97 and result.figures["as_asked"].baseline > 0.97
    assert result.figures["fid"].value < 2 * result.figures["fid"].baseline
    held = load_dataset("digits", 32, split="test").all()
    light = result.figures["discriminator"]
    assert light.baseline == pytest.approx(held.images.mean().item() + held.labels.double().mean().item(), abs=1e-4)
    assert light.value == pytest.approx(4.5 + real.batch.images.mean().item(), abs=0.05)
    assert {"kid", "precision", "recall", "inception_score"} < set(result.figures)
    assert evaluate_model(real, config("cgan"), 300, 0) == result
    wrong = evaluate_model(RealDigits(32, off_by=1), config("cgan"), 300, 0)
    assert wrong.figures["as_asked"].value < 0.03 and wrong.recognised.share > 0.9


class LinearVAE:
    """Probabilistic PCA as a VAE: its posterior is exact, so its bound equals the Gaussian's likelihood."""

    config = SimpleNamespace(nz=5, likelihood="gaussian")

    def __init__(self):
        images = load_dataset("digits", SIZE).all().images
        fitted = PCAGaussian(images, self.config.nz)
        self.mean, self.variance = fitted.mean.float(), fitted.noise.float()
        self.weight = (fitted.directions * (fitted.variances - fitted.noise).sqrt()).float()

    def encode(self, images):
        variance = self.variance / (self.weight.square().sum(0) + self.variance)
        mu = (images.flatten(1) - self.mean) @ self.weight / self.variance * variance
        return mu, variance.log().expand(mu.shape)

    def decode(self, z):
        return (z @ self.weight.T + self.mean).view(-1, 1, SIZE, SIZE)

    def nll(self, decoded, images):
        squares = (images - decoded).square().flatten(1) / self.variance
        return (squares + (2 * torch.pi * self.variance).log()).sum(1) / 2

    def sample(self, n, *, generator):
        return self.decode(torch.randn(n, 5, generator=generator))


def test_a_linear_vae_is_as_good_as_the_pca_gaussian():
    figures = evaluate_model(LinearVAE(), config("vae"), 50, 0).figures
    assert figures["nll"].value == pytest.approx(figures["nll"].baseline, rel=1e-3)
    assert figures["elbo"].value == pytest.approx(-figures["nll"].value, rel=1e-3)
    assert "5 directions, fitted to 1347 images" in figures["nll"].baseline_is
    assert 10 < figures["reconstruction_psnr"].value < 30


class Greyer:
    """A translation that turns images grey, and leaves grey ones unchanged."""

    def translate(self, images, direction):
        return to_grey(images) if direction == "a_to_b" else images


def test_a_translation_with_a_known_target():
    figures = evaluate_model(Greyer(), config("cyclegan"), 1000, 0).figures
    assert figures["a_to_b_psnr"].value > 45 > figures["a_to_b_psnr"].baseline
    assert figures["b_to_a_psnr"].value == figures["b_to_a_psnr"].baseline
    assert figures["a_to_b_recognised"].value > 0.8 > 0.3 > figures["b_to_a_recognised"].value
    assert "200 translated held-out images" in figures["a_to_b_recognised"].protocol


def test_a_folder_without_a_test_part_is_halved(tmp_path, caplog):
    draw = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(256, (SIZE, SIZE), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    model = SimpleNamespace(
        config=SimpleNamespace(),
        sample=lambda n, *, generator: torch.rand(n, 1, SIZE, SIZE, generator=generator) * 2 - 1,
    )
    result = evaluate_model(model, config("gan", data=str(tmp_path)), 30, 0)
    assert result.recognised is None and "12 generated images against 12 real ones" in result.figures["fid"].protocol
    for number in range(12):
        (tmp_path / f"{number}.png").unlink()
    evaluation._real.cache_clear()
    assert evaluate_model(model, config("gan", data=str(tmp_path)), 30, 0) == Evaluation({}, None)
    assert "fewer than 10 images" in caplog.text


def test_psnr_is_the_formula():
    assert psnr(torch.full((2, 1, 4, 4), 0.2), torch.zeros(2, 1, 4, 4)) == pytest.approx(20, abs=1e-5)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])


def test_the_page_is_one_file_with_everything(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(1, 13):
        Image.new("L", (4, 4), step).save(tmp_path / "samples" / f"step_{step:06d}.png")
    (tmp_path / "samples" / "step_mine.png").write_bytes(b"no picture of a step")
    Image.new("L", (4, 4)).save(tmp_path / "samples.png")
    settings = dataclasses.replace(CONFIGS["dcgan"](), data="<script>alert(1)</script>", nz=7)
    records = [
        {"step": step, "losses": {"d_loss": 1 / step, "<b>": 3.0}, "images_per_second": 1234.0}
        for step in range(1, 2000)
    ]
    figures = {"fid": Figure(12.5, "FID, by <i>name</i>", "lower", 0.25)}
    plot = plot_losses(records)
    write_report(tmp_path, settings, 1999, records, Evaluation(figures, None), "conv & norm <fused>", plot.svg)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) == 1 + 8 and "step 12<" in text and "step 1<" in text
    for image in page.images:
        kind, _, content = image.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG")
    assert not re.search(r"https?:|url\((?!#)|@import", text), "nothing is loaded from elsewhere"
    assert not {"script", "link", "b>", "i"} & page.tags
    for shown in (
        "12.5",
        "0.25 (real images)",
        "1,234 images/s",
        "nz *",
        "conv &amp; norm &lt;fused&gt;",
        "width=device-width",
    ):
        assert shown in text
    assert plot.svg in text and text.count("<svg") == 1 and "&lt;b&gt;</text>" in plot.svg
    curves = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #1f77b4', plot.svg)
    assert len(curves) == 2 and all(1 < curve.count("L") < 300 for curve in curves), "thousands of points are averaged"
    write_report(tmp_path, settings, 0, [], None, "", None)
    assert "not measured" in (tmp_path / "report.html").read_text()
