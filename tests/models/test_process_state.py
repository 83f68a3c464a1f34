"""Neither process-wide settings (default dtype and device, autocast, inference and deterministic mode) nor operations
on a model (copies, pickles, other dtypes) change its results or its training."""

import copy
import pickle

import pytest
import torch

import fastgen
from fastgen.errors import UsageError
from fastgen.models import create_model
from tests.models.tiny import TINY, defaults, make
from tests.support.tolerance import UNIT_ROUNDOFF


def draw(model, n=2, seed=1):
    """Images from each of the model's ways to generate them, with the same random numbers each time."""
    declared, weight = model.capabilities, next(model.parameters())
    if declared.directions:
        source = torch.Generator("cpu").manual_seed(seed)
        images = {
            direction: torch.randn(n, before, 16, 16, generator=source, dtype=torch.float32, device="cpu").tanh()
            for direction, (before, _) in declared.directions.items()
        }
        return [model.translate(image.to(weight), direction) for direction, image in images.items()]
    labels = torch.tensor([0, 1] * (n // 2), dtype=torch.int64, device="cpu")
    known = {"labels": labels, "captions": ["a two"] * n}
    values = {condition.name: known[condition.name] for condition in declared.conditions}
    with torch.no_grad():
        encoded = [condition.encode(values[condition.name]).to(weight.device) for condition in declared.conditions]
        z = model.latent(n, generator=torch.Generator("cpu").manual_seed(seed))
        images = model.sample(n, generator=torch.Generator("cpu").manual_seed(seed), **values)
        return [images, model.generate(z, *encoded)]


def train(model):
    """One training step of all parts of the model."""
    declared = model.capabilities
    if declared.directions:
        images = draw(model)[0].detach()
        loss = model(torch.randn(2, 3, 16, 16)).mean() + model.discriminator_b(images).mean()
    elif declared.encodes:
        images = torch.rand(2, 1, declared.image_size, declared.image_size)
        reconstruction, *_ = model(images)
        model.fit_log_std(fastgen.losses.l2_loss(reconstruction, images))
        loss = model.nll(reconstruction, images).mean()
    else:
        values = {"labels": torch.tensor([1, 2]), "captions": ["a two", "one"]}
        encoded = [condition.encode(values[condition.name]) for condition in declared.conditions]
        loss = model.discriminator(model(model.latent(2), *encoded), *encoded).mean()
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.step()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_default_dtype_and_device(name):
    model = make(name).eval()
    expected = draw(model)
    with defaults():
        actual = draw(model)
        assert len(actual) == len(expected)
    for image, reference in zip(actual, expected, strict=True):
        assert image.dtype is torch.float32 and image.device.type == "cpu"
        torch.testing.assert_close(image, reference)  # PyTorch's Transformer takes another path if a device is set
    with defaults(device="cpu"):
        double = make(name).eval()
        images = draw(double)
        train(double.train())
    tensors = [*double.parameters(), *double.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert all(image.dtype is torch.float64 for image in images)
    with defaults(torch.float32):
        on_meta = create_model(TINY[name][0], **TINY[name][1]).eval()
        assert all(image.device.type == "meta" for image in draw(on_meta))
    assert all(tensor.device.type == "meta" for tensor in (*on_meta.parameters(), *on_meta.buffers()))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(name, dtype):
    model = make(name).eval()
    expected = draw(model)
    for image, reference in zip(draw(model.to(dtype)), expected, strict=True):
        assert image.dtype is dtype
        assert (image.float() - reference).norm() <= (0.1 if dtype is torch.bfloat16 else 1e-4) * reference.norm()


AUTOCAST = 16 * UNIT_ROUNDOFF[torch.bfloat16]  # of pixels from -1 to 1: each of a network's layers rounds to bfloat16


@pytest.mark.parametrize("name", TINY)
def test_modes(name):
    model = make(name).eval()
    expected = draw(model)
    if model.capabilities.draws:
        torch.testing.assert_close(*expected)  # sample is generate of latent
    with torch.inference_mode():
        for image, reference in zip(draw(model), expected, strict=True):
            assert torch.equal(image, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for image, reference in zip(draw(model), expected, strict=True):
            torch.testing.assert_close(image.float(), reference, rtol=0, atol=AUTOCAST)
    torch.use_deterministic_algorithms(True)
    try:
        for image, reference in zip(draw(model), expected, strict=True):
            torch.testing.assert_close(image, reference)
        train(model.train())
    finally:
        torch.use_deterministic_algorithms(False)
    train(model)  # no tensor made in inference mode is kept


@pytest.mark.parametrize("name", TINY)
def test_copies(name):
    model = make(name)
    if hasattr(model, "log_std"):
        model.log_std.fill_(-1)
    train(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.eval()
    for copied in copies:
        assert copied.config == model.config and list(copied.state_dict()) == list(model.state_dict())
        assert all(module.training for module in copied.modules())
        for image, reference in zip(draw(copied.eval()), draw(model), strict=True):
            torch.testing.assert_close(image, reference)
        train(copied.train())
        same = [torch.equal(*pair) for pair in zip(copied.parameters(), model.parameters(), strict=True)]
        assert not all(same), "it has parameters of its own"


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("cyclegan")])
def test_counts_of_images(name):
    model = make(name)
    options = {"captions": "a two"} if name == "text2image" else {}
    assert model.sample(0, **options).shape == (0, 1, model.config.image_size, model.config.image_size)
    assert model.sample(torch.tensor(2), **options).shape[0] == 2  # as wherever Python wants an integer
    for n in (-1, 2.0, "2", None, 2**31, (2,), torch.tensor([1, 2])):
        with pytest.raises(UsageError, match="n must be a number of images below "):
            model.sample(n, **options)
    for generator in (7, "cpu", torch.default_generator.manual_seed):
        with pytest.raises(UsageError, match=r"generator must be a torch\.Generator, not "):
            model.sample(2, generator=generator, **options)


def labels(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


Z, IMAGES = torch.zeros(2, 4), torch.zeros(2, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        ("cgan", lambda model: model(Z, labels(0, 10)), r"labels must be between 0 and 9"),
        ("cgan", lambda model: model(Z, labels(-1, 3)), r"labels must be between 0 and 9"),
        ("cgan, conditional norm", lambda model: model(Z, labels(-1, 3)), r"labels must be between 0 and 9"),
        ("cgan", lambda model: model(Z, labels(1)), r"labels must be \(2,\), as there are 2 images, not \(1,\)"),
        ("cgan", lambda model: model(Z, labels(1, 2)[:, None]), r"labels must be \(2,\), .* not \(2, 1\)"),
        (
            "cgan",
            lambda model: model(Z, labels(1.0, 2.0, dtype=torch.float32)),
            "labels must be int64, not torch.float32",
        ),
        ("cgan", lambda model: model(Z, labels(0, 1, dtype=torch.bool)), "labels must be int64, not torch.bool"),
        ("cgan", lambda model: model.discriminator(IMAGES, labels(1)), r"labels must be \(2,\), .* not \(1,\)"),
        ("cgan", lambda model: model.discriminator(IMAGES[:1], labels(1, 2)), r"labels must be \(1,\), .* not \(2,\)"),
        ("cgan", lambda model: model.discriminator(IMAGES, labels(1, 10)), "labels must be between 0 and 9"),
        ("cgan", lambda model: model.sample(2, labels=[1, 2]), r"labels must be a tensor \(2,\) int64, not a list"),
        ("cgan", lambda model: model.sample(2, labels=labels(-1, 0)), "labels must be between 0 and 9, not -1 to 0"),
        ("text2image", lambda model: model(Z, torch.zeros(1, 4)), r"condition must be \(2, 4\), .* not \(1, 4\)"),
        ("text2image", lambda model: model.discriminator(IMAGES, torch.zeros(2, 5)), r"condition must be \(2, 4\), .*"),
        ("text2image", lambda model: model.text_encoder("a one"), "captions must be a list of texts, not 'a one'"),
        (
            "text2image",
            lambda model: model.text_encoder(["a", None]),
            r"captions must be a list of texts, not \['a', None\]",
        ),
        ("text2image", lambda model: model.text_encoder(["a", ""]), "caption '' has no word"),
        ("text2image", lambda model: model.sample(2, captions=5), "captions must be a text or a list of texts, not 5"),
        (
            "text2image",
            lambda model: model.sample(2, captions=["a", b"one"]),
            "captions must be a list of texts, not .*b'one'",
        ),
        ("text2image", lambda model: model.sample(2, captions=[]), "captions must be one text or 2, not 0"),
        (
            "vae_mlp",
            lambda model: model(IMAGES[..., :8, :8].byte()),
            r"images must be floating-point in .*, not torch\.uint8",
        ),
        ("vae", lambda model: model.encode(IMAGES[..., :8, :8].long()), "images must be floating-point .* torch.int64"),
        ("gan", lambda model: model.discriminator(IMAGES[..., :8, :8].byte()), "images must be floating-point"),
        ("cyclegan", lambda model: model(torch.zeros(1, 3, 16, 16).byte()), "images must be floating-point"),
        ("gan", lambda model: model(Z.long()), "z must be floating-point, not torch.int64"),
        ("dcgan", lambda model: model(Z.bool()), r"z must be floating-point, not torch\.bool"),
    ],
)
def test_invalid_inputs(name, act, message):
    with pytest.raises(UsageError, match=message):
        act(make(name))
