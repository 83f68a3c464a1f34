"""Properties of every model, and of each model except the DCGAN, which has its own file."""

import pytest
import torch
from torch import nn

import fastgen
from fastgen.errors import FastgenError, UsageError
from fastgen.models import create_model, list_models, make_vocabulary
from fastgen.models.text_encoder import HuggingFaceTextEncoder
from tests.models.tiny import SMALL, TINY, defaults, make
from tests.support import networks
from tests.support.tolerance import FLOAT32, units


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_model_is_here():
    assert {model for model, *_ in TINY.values()} == set(list_models()) == set(fastgen.list_models())


@pytest.mark.parametrize("name", TINY)
def test_every_hot_layer_is_fused(name):
    report = fastgen.fusion_report(make(name))
    _, _, runs, alone = TINY[name]
    assert len(report.fused) == runs and report.fusable == () and report.swappable == ()
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)
    left = {entry.name for entry in report.left}
    assert {
        module for module, layer in make(name).named_modules() if module in left and isinstance(layer, kinds)
    } == alone
    assert len(report.swapped) == ("vae" in name)


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("cyclegan")])
def test_samples(name):
    model = make(name)
    conditions = {"captions": "a handwritten two"} if name == "text2image" else {}
    images = model.sample(3, generator=torch.Generator().manual_seed(1), **conditions)
    assert images.shape == (3, 1, model.config.image_size, model.config.image_size)
    assert images.abs().max() <= 1 and not images.requires_grad
    assert torch.equal(images, model.sample(3, generator=torch.Generator().manual_seed(1), **conditions))
    assert all(module.training for module in model.modules()), "sample leaves the mode as it was"


ANOTHER = units(torch.float32, 16, 0)  # more than rounding


def test_cgan_draws_the_classes_asked_for():
    for name in ("cgan", "cgan, conditional norm"):
        model = make(name)
        if model.generator.stages:
            for stage in model.generator.stages:
                nn.init.normal_(stage.gain.weight)
        model.eval()
        z, labels = model.latent(1).expand(3, -1), torch.tensor([4, 4, 5])
        images = model(z, labels)
        torch.testing.assert_close(images[0], images[1])
        assert not torch.allclose(images[0], images[2])
        logits = model.discriminator(images[:1].expand(3, -1, -1, -1), labels)
        torch.testing.assert_close(logits[0], logits[1])
        assert not torch.allclose(logits[0], logits[2], **ANOTHER)
        drawn = [
            model.sample(12, generator=torch.Generator().manual_seed(2), labels=of)
            for of in (None, torch.arange(12) % 10)
        ]
        assert torch.equal(*drawn)


def test_projection_is_the_inner_product_with_the_features():
    model = make("cgan")
    images, labels = torch.randn(2, 1, 32, 32), torch.tensor([3, 7])
    discriminator = model.discriminator
    features = discriminator.main(images)
    expected = discriminator.head(features).flatten()
    expected += torch.einsum("nchw,nc->n", features, discriminator.embedding.weight[labels])
    torch.testing.assert_close(discriminator(images, labels), expected)


def test_conditional_batch_norm_is_its_formula():
    norm = fastgen.nn.ConditionalBatchNorm2d(3, 4).double()
    x, labels = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 3, 3, 2])
    torch.testing.assert_close(norm(x, labels), nn.functional.batch_norm(x, None, None, training=True))
    nn.init.normal_(norm.gain.weight), nn.init.normal_(norm.bias.weight)
    plain = nn.functional.batch_norm(x, None, None, training=True)
    gain, bias = norm.gain.weight[labels], norm.bias.weight[labels]
    expected = torch.einsum("nc,nchw->nchw", gain, plain) + bias[:, :, None, None]
    torch.testing.assert_close(norm(x, labels), expected)


LIKELIHOOD = units(torch.float32, 64, 64)  # a sum over 64 pixels, of logarithms here and of their formula there


@pytest.mark.parametrize("name", ["vae", "vae, bernoulli", "vae_mlp"])
def test_vae_gives_reconstruction_and_moments(name):
    model = make(name)
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    reconstruction, mu, logvar = model(images, torch.Generator().manual_seed(3))
    assert reconstruction.shape == images.shape and mu.shape == logvar.shape == (5, 4)
    z, kl = model.reparameterize(mu, logvar, torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.decode(z), reconstruction)
    torch.testing.assert_close(kl, fastgen.losses.gaussian_kl(mu, logvar))
    likelihood = torch.distributions.Normal(reconstruction, model.log_std.exp()) if name == "vae" else None
    if likelihood is None:
        likelihood, images = torch.distributions.Bernoulli((reconstruction + 1) / 2), images.sign()
    expected = -likelihood.log_prob((images + 1) / 2 if name != "vae" else images).sum((1, 2, 3))
    torch.testing.assert_close(model.nll(reconstruction, images), expected, **LIKELIHOOD)


def test_published_sizes():
    assert count(create_model("vae_mlp")) == 652_824
    cyclegan = create_model("cyclegan")
    assert count(cyclegan.a_to_b) == 11_378_179 and count(cyclegan.discriminator_a) == 2_764_737
    unet = create_model("cyclegan", generator="unet", norm="batch")
    assert count(unet.a_to_b) == 54_413_955


def test_unet_without_in_place_activations_equals_the_public_one():
    torch.manual_seed(0)
    block = networks.UnetBlock(16, 16)
    for outer, inner in ((8, 16), (4, 8), (2, 4)):
        block = networks.UnetBlock(outer, inner, block)
    original = networks.UnetBlock(3, 2, block, outermost=True)
    network = fastgen.models.UnetGenerator(3, 3, 2, 5)
    network.model.load_state_dict(original.state_dict())
    images = torch.randn(2, 3, 64, 32)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(images), original.train(mode)(images), **FLOAT32)


def test_cyclegan_translates_any_size_both_ways():
    model = make("cyclegan")
    for size in ((16, 16), (8, 20)):
        assert model.translate(torch.zeros(2, 3, *size), "a_to_b").shape == (2, 1, *size)
        assert model.translate(torch.zeros(2, 1, *size), "b_to_a").shape == (2, 3, *size)


def test_text_encoder_reads_words():
    model = make("text2image").eval()
    encoder = model.text_encoder
    one, two, other_case, padded = encoder(["a handwritten one", "a handwritten two", "A  Handwritten ONE", "one"])
    torch.testing.assert_close(one, other_case)
    assert not torch.allclose(one, two) and not torch.allclose(one, padded)
    torch.testing.assert_close(encoder(["one", "a handwritten two, two"])[0], padded)  # padding has no effect
    assert encoder(["one " * 500]).isfinite().all()
    assert make_vocabulary(["a two, a one", "a one"]) == ("a", "one", ",", "two")


@pytest.mark.parametrize("kind", ["Bert", "T5", "CLIP"])
def test_hugging_face_text_encoder(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\none\ntwo\n")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    bert = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes = {
        "Bert": bert,
        "T5": {"vocab_size": 7, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
        "CLIP": {"text_config": {**bert, "eos_token_id": 3}, "vision_config": bert, "projection_dim": 4},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    model = create_model("text2image", **SMALL, text_encoder=str(tmp_path), caption_width=4)
    assert set(model.text_encoder.state_dict()) == {"project.weight", "project.bias"}, "its weights stay where they are"
    assert model.sample(2, captions=["one", "two two"]).shape == (2, 1, 32, 32)
    one, two = model.text_encoder(["one", "two two"])
    torch.testing.assert_close(model.text_encoder(["one"])[0], one)
    assert not torch.allclose(one, two)
    with torch.device("meta"):  # as a run creates its model
        loaded = create_model("text2image", **SMALL, text_encoder=str(tmp_path), caption_width=4).eval()
    loaded.load_state_dict(model.state_dict(), assign=True)
    with defaults():
        images = loaded.sample(2, captions=["one", "two two"], generator=torch.Generator("cpu").manual_seed(1))
    expected = model.sample(2, captions=["one", "two two"], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images, expected)
    assert model.double().sample(1, captions="one").dtype is torch.float64
    with pytest.raises(UsageError, match="caption ' ' has no word"):
        model.text_encoder(["one", " "])


def test_missing_text_encoders(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(FastgenError, match=r"needs transformers: pip install 'fastgen\[text\]'"):
        HuggingFaceTextEncoder("some/encoder")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make("cgan").sample(2, labels=torch.tensor([0, 10])), "labels must be between 0 and 9, not 0 to 10"),
        (lambda: make("cgan").sample(2, labels=torch.tensor([0])), r"labels must be \(2,\) int64, not \(1,\)"),
        (lambda: make("cgan").sample(1, labels=torch.tensor([0.0])), "int64, not .* torch.float32"),
        (lambda: make("text2image").sample(2), "captions must say what to draw"),
        (lambda: make("text2image").sample(3, captions=["a one", "a two"]), "captions must be one text or 3, not 2"),
        (lambda: make("text2image").sample(1, captions="seven zebras"),
        "'seven zebras' has no word .*: a, handwritten"), (lambda: make("text2image").sample(1, captions=""),
        "caption '' has no word"), (lambda: make("cyclegan").translate(torch.zeros(1, 3, 8, 8), "b_to_a"),
        r"images must be \(N, 1, H, W\)"), (lambda: make("cyclegan").translate(torch.zeros(1, 3, 10, 8)),
        "multiples of 4 from 8 up, not 10x8"), (lambda: make("cyclegan").translate(torch.zeros(1, 3, 8, 8), "a"),
        "direction must be 'a_to_b' or 'b_to_a', not 'a'"), (lambda: make("cyclegan, unet").translate(torch.zeros(1, 3,
        12, 8)), "multiples of 8, not 12x8"), (lambda: make("vae").encode(torch.zeros(1, 1, 9, 8)),
        r"images must be \(N, 1, 8, 8\), not \(1, 1, 9, 8\)"), (lambda: make("vae").decode(torch.zeros(1, 5)),
        r"z must be \(N, 4\)"), (lambda: make("gan")(torch.zeros(1, 5)), r"z must be \(N, 4\)"),
        (lambda: create_model("vae", image_size=36), "image_size must be a multiple of 32 for 5 widths, not 36"),
        (lambda: create_model("vae", widths=()), "widths must be 1 to 16 positive integers"),
        (lambda: create_model("vae", likelihood="normal"),
        "likelihood must be one of gaussian, bernoulli, not 'normal'"),
        (lambda: create_model("cyclegan", image_size=30),
        "image_size must be a multiple of 4"), (lambda: create_model("cyclegan", image_size=8),
        "image_size must be at least 24 for 3 discriminator_layers"), (lambda: create_model("cyclegan", norm="layer"),
        "norm must be"), (lambda: create_model("text2image", vocabulary=()), "vocabulary must hold words"),
        (lambda: create_model("text2image", text_width=6), "text_width must be a multiple of 4, not 6"),
        (lambda: create_model("gan", width=0), "width must be between 1 and 65536, not 0"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(act, message):
    with pytest.raises(UsageError, match=message):
        act()
