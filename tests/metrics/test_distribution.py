import functools

import pytest
import torch

from fastgen.data import ImageDataset
from fastgen.errors import DataError, FastgenError, UsageError
from fastgen.metrics import FeatureExtractor, Reference, distribution, inception, train_classifier

pytest.importorskip("torchmetrics")


def pixels(images):
    return images.flatten(1), None


PIXELS = FeatureExtractor(pixels, "the pixels themselves")


def compare(generated, real, held, extractor, **options):
    return Reference(real, held, extractor).compare(generated, **options)


def normal(n, mean=0.0, std=1.0, seed=0):
    return mean + std * torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_fid_is_the_formula_for_gaussians():
    n = 4000
    figures = compare(normal(n, 0.5, 2.0, 1), normal(n), normal(n, seed=2), PIXELS)
    # |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), four dimensions
    assert figures["fid"].value == pytest.approx(4 * 0.5**2 + 4 * (2 - 1) ** 2, rel=0.06)
    assert figures["fid"].baseline < 0.02 and abs(figures["kid"].baseline) < 0.05 < figures["kid"].value
    assert "inception_score" not in figures, "pixels have no classes"
    for figure in figures.values():
        assert "4000 generated images against 4000 real ones" in figure.protocol and "the pixels" in figure.protocol


def test_precision_and_recall_tell_what_is_missing():
    real = torch.cat([normal(300, -10, seed=1), normal(300, 10, seed=2)])
    held = torch.cat([normal(100, -10, seed=3), normal(100, 10, seed=4)])
    one_mode = compare(normal(200, 10, seed=5), real, held, PIXELS)
    assert one_mode["precision"].value > 0.85 and one_mode["recall"].value < 0.55
    too_wide = compare(torch.cat([held[::2], normal(100, 40, seed=6)]), real, held, PIXELS)
    assert 0.4 < too_wide["precision"].value < 0.55 and too_wide["recall"].value > 0.8
    assert min(one_mode["precision"].baseline, one_mode["recall"].baseline) > 0.85


def test_inception_score_counts_classes():
    classes = FeatureExtractor(lambda images: (images.flatten(1), images.flatten(1) * 100), "four classes")
    each = torch.eye(4).repeat(50, 1).view(200, 1, 2, 2)
    noise = normal(200, std=0.01)
    assert compare(each + noise, each, each, classes)["inception_score"].value == pytest.approx(4, rel=0.1)
    one = each[:1].expand(200, -1, -1, -1)
    assert compare(one + noise, each, each, classes)["inception_score"].value == pytest.approx(1, rel=0.1)


def test_figures_are_the_same_for_the_same_seed_and_leave_the_generator():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = compare(normal(50, 1), normal(60), normal(50, seed=3), PIXELS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert compare(normal(50, 1), normal(60), normal(50, seed=3), PIXELS, seed=1) == first


def test_too_few_or_other_images_are_refused():
    with pytest.raises(UsageError, match=r"generated must be 10 or more images .* not \(9, 1, 2, 2\)"):
        compare(normal(9), normal(20), normal(20), PIXELS)
    with pytest.raises(UsageError, match="held must be"):
        compare(normal(20), normal(20), normal(20).expand(-1, 3, -1, -1), PIXELS)


def stripes(n, seed):
    """Noisy images with light rows (class 0) or light columns (class 1)."""
    labels = torch.arange(n) % 2
    rows = torch.arange(8) % 2 * 2.0 - 1
    images = torch.stack([rows[:, None].expand(8, 8) if label == 0 else rows.expand(8, 8) for label in labels])
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.3
    return ImageDataset("stripes", images[:, None] + noise, labels, ("rows", "columns"))


@functools.cache
def trained(labelled=True):
    sets = [stripes(200, seed) for seed in (0, 1)]
    if not labelled:
        sets = [ImageDataset(data.name, data.images.tril()) for data in sets]
    return train_classifier(*sets, steps=40)


def test_a_classifier_learns_and_reports_its_accuracy():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    extractor = trained()
    assert torch.equal(torch.get_rng_state(), state)
    features, logits = extractor(stripes(20, 2).images)
    assert features.shape == (20, 64) and (logits.argmax(1) == torch.arange(20) % 2).all()
    accuracy = "its accuracy on 200 others is 100.0%"
    for words in ("200 real images of stripes for its 2 classes", "at 8x8 pixels", accuracy):
        assert words in extractor.description
    assert features.std().item() == pytest.approx(1, rel=0.2)
    again = train_classifier(stripes(200, 0), stripes(200, 1), steps=40)
    assert torch.equal(again(stripes(20, 2).images)[0], features), "deterministic"


def test_without_labels_it_learns_quarter_turns():
    extractor = trained(labelled=False)
    features, logits = extractor(stripes(20, 2).images)
    assert logits is None and features.shape == (20, 64) and "quarter turns" in extractor.description
    assert float(extractor.description.split("others is ")[1].split("%")[0]) > 60


class StandInForInception(torch.nn.Module):
    def forward(
        self, pixels: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        values = pixels.float().flatten(1)[:, :5]
        return values if return_features else values.softmax(1)


def test_inception_is_loaded_from_a_local_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception() is None
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "inception-2015-12-05.pt"
    torch.jit.script(StandInForInception()).save(str(path))
    features, logits = inception()(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2))
    assert torch.equal(features[:, 0], torch.tensor([0.0, 128.0, 255.0])) and logits.shape == (3, 5)
    monkeypatch.setenv("FASTGEN_INCEPTION", str(tmp_path / "none"))
    with pytest.raises(FastgenError, match="but there is no such file"):
        inception()
    path.write_bytes(b"damaged")
    monkeypatch.setenv("FASTGEN_INCEPTION", str(path))
    with pytest.raises(FastgenError, match="is not a TorchScript file"):
        inception()


def nan_at(images, at, value=float("nan")):
    images = images.clone()
    images[at, 0, 1, 1] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_is_named(value):
    bad = nan_at(normal(30), 17, value)
    for which, sets in (("generated", (bad, normal(20), normal(20))), ("real", (normal(20), bad, normal(20)))):
        with pytest.raises(DataError, match=f"{which} must be finite, but image 17 of 30"):
            compare(*sets, PIXELS)
    overflow = FeatureExtractor(lambda images: (images.flatten(1) * 1e38, None), "large numbers")
    with pytest.raises(DataError, match="the features of held must be finite, but image 3 of 20"):
        compare(normal(20), normal(20) / 100, nan_at(normal(20) / 100, 3, 40.0), overflow)
    with pytest.raises(DataError, match="stripes must be finite, but image 5 of 200"):
        train_classifier(ImageDataset("stripes", nan_at(stripes(200, 0).images, 5, value)), steps=1)


def test_constant_and_huge_images_have_figures():
    one, others = torch.full((30, 1, 2, 2), 0.7), normal(40, seed=1)
    same = compare(one, one, one, PIXELS)
    assert same["fid"].value == 0 and same["precision"].value == same["recall"].value == 1
    assert compare(one, one - 0.5, one - 0.5, PIXELS)["fid"].value == pytest.approx(4 * 0.5**2)
    collapsed = compare(one, others, others, PIXELS)
    mean, variance = others.flatten(1).double().mean(0), others.flatten(1).double().var(0).sum()
    assert collapsed["fid"].value == pytest.approx(((mean - 0.7).square().sum() + variance).item(), rel=1e-6)
    assert collapsed["recall"].value == 0
    huge = compare(torch.full((20, 1, 2, 2), 1e30), others, others, PIXELS)
    assert huge["fid"].value == pytest.approx(4e60) and huge["precision"].value == 0
    constant = ImageDataset("grey", torch.zeros(40, 1, 8, 8))
    figures = Reference(constant.images, constant.images, train_classifier(constant, constant, steps=2))
    assert figures.compare(constant.images)["fid"].value == 0


def test_process_wide_settings_change_no_figure():
    sets, images = [stripes(60, 0), stripes(60, 1)], [stripes(40, seed).images for seed in range(3)]

    def figures():
        return compare(images[2], images[0], images[1], train_classifier(*sets, steps=2))

    expected = figures()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = figures()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found == expected


def test_inception_score_of_classes_that_never_occur():
    """With two of three classes in equal shares and none of the third, exp(KL) is 2."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, -1e4]]).repeat(10, 1)
    assert distribution._inception_score(logits, 1) == pytest.approx(2.0)
    assert distribution._inception_score(logits[::2], 1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda x: x.flatten(1), "must return features and logits"),
        (lambda x: (x.mean((1, 2, 3)), None), r"features \(N, D\) for N images, not \(12,\) for 12"),
        (lambda x: (x, None), r"features \(N, D\)"),
        (lambda x: (x.flatten(1)[:3], None), r"features \(N, D\) for N images, not \(3, 256\) for 12"),
        (lambda x: (x.flatten(1), x.flatten(1)[:2]), r"logits \(N, K\)"),
    ],
)
def test_what_an_extractor_must_return(result, says):
    with pytest.raises(UsageError, match=says):
        FeatureExtractor(result, "mine")(torch.zeros(12, 1, 16, 16))


def test_what_a_classifier_is_trained_on():
    images, classes = torch.rand(6, 1, 8, 8), ("a", "b")
    with pytest.raises(DataError, match="the labels of x must be 0 to 1, but run from 0 to 5"):
        train_classifier(ImageDataset("x", images, torch.arange(6), classes), steps=1)
    with pytest.raises(DataError, match="x has 6 images, but 5 labels"):
        train_classifier(ImageDataset("x", images, torch.zeros(5).long(), classes), steps=1)
    with pytest.raises(DataError, match="x holds no images"):
        train_classifier(ImageDataset("x", images[:0]), steps=1)
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        train_classifier(ImageDataset("x", images), steps=0)


def test_images_are_floating_point():
    images = torch.rand(12, 1, 2, 2)
    for bad, found in (((images * 255).byte(), "a tensor of torch.uint8"), ([images], "a list")):
        with pytest.raises(UsageError, match=rf"must be a tensor of floating-point numbers in \[-1, 1\], not {found}"):
            compare(bad, images, images, PIXELS)
        with pytest.raises(UsageError, match="real must be a tensor of floating-point"):
            Reference(bad, images, PIXELS)
