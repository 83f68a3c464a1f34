"""Every system trains, resumes to the same bits, and names what is missing in its data."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

import fastgen
from fastgen.data import DomainPair, ImageDataset, load_dataset
from fastgen.errors import DataError
from fastgen.training import CONFIGS, load_model, train
from fastgen.training.augment import augment
from fastgen.training.checkpoint import load_meta
from fastgen.training.recipes import RECIPES
from fastgen.training.recipes.cyclegan import ImagePool
from tests.support.tolerance import units

pytestmark = pytest.mark.usefixtures("one_thread")

GAN = {"batch_size": 4, "nz": 4}
DCGAN = {**GAN, "ngf": 2, "ndf": 2}
# system, options
RUNS = {
    "gan": ("gan", {**GAN, "width": 8, "image_size": 8, "loss": "minimax", "optimizer": "sgd", "beta1": 0.5}),
    "dcgan": ("dcgan", {**DCGAN, "augment": "color,translation,cutout", "clip_grad": 0.5, "r1_every": 2}),
    "dcgan in bf16": ("dcgan", {**DCGAN, "precision": "bf16", "loss": "hinge", "r1_every": 2}),
    "wgan": ("wgan", {**DCGAN, "d_steps": 2}),
    "wgan_gp": ("wgan_gp", {**DCGAN, "d_steps": 2}),
    "lsgan": ("lsgan", {**DCGAN, "optimizer": "sgd"}),
    "cgan": ("cgan", {**DCGAN, "embedding": 4, "generator_norm": "conditional", "r1_every": 2}),
    "vae": ("vae", {"batch_size": 4, "image_size": 16, "nz": 4, "width": 2}),
    "vae, mlp": (
        "vae",
        {"batch_size": 4, "image_size": 8, "nz": 4, "width": 2, "architecture": "mlp"},
    ),
    "cyclegan": (
        "cyclegan",
        {"batch_size": 1, "image_size": 16, "ngf": 2, "ndf": 2, "generator": "resnet", "blocks": 1, "pool_size": 2}
        | {"norm": "instance"},
    ),
    "cyclegan, unet in bf16": (
        "cyclegan",
        {"batch_size": 1, "image_size": 16, "ngf": 2, "ndf": 2, "generator": "unet", "unet_depth": 3, "dropout": True}
        | {"precision": "bf16", "identity": 0.0},
    ),
    "text2image": ("text2image", {**DCGAN, "text_width": 8, "text_layers": 1, "caption_width": 4, "r1_every": 2}),
}


def tiny(name, **options):
    system, settings = RUNS[name]
    return CONFIGS[system](**({"steps": 5, "log_every": 1, "save_every": 3} | settings | options))


def recipe_of(config, data=None):
    torch.manual_seed(config.seed)
    data = load_dataset(config.data, config.image_size) if data is None else data
    return RECIPES[config.system](config, data, torch.device("cpu"), torch.Generator().manual_seed(0))


def test_every_system_is_here():
    assert {system for system, _ in RUNS.values()} == set(CONFIGS) == set(RECIPES)


@pytest.mark.parametrize("name", RUNS)
def test_trains_and_resumes_to_the_same_bits(name, tmp_path, monkeypatch):
    config = tiny(name)
    # the steps after training have tests of their own
    monkeypatch.setattr("fastgen.training.run.finish_run", lambda *arguments: None)
    straight = train(config, tmp_path / "straight")
    state = load_file(straight.folder / load_meta(straight.folder)["tensors"]["file"])
    start = recipe_of(config).tensors()
    trained = [key for key in start if key.startswith("model.") and start[key].is_floating_point()]
    moved = {key for key in trained if not torch.equal(start[key], state[key])}
    networks = {part for parts in RECIPES[config.system].parts.values() for part in parts}
    assert all(any(key.startswith(f"model.{part}") for key in moved) for part in networks)

    def killed(self, step, advance=RECIPES[config.system].advance):
        if step == 4:
            raise KeyboardInterrupt
        return advance(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(RECIPES[config.system], "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    assert load_meta(tmp_path / "run")["step"] == 3
    torch.manual_seed(99)
    train(config, tmp_path / "run", resume=True)
    resumed = load_file(tmp_path / "run" / load_meta(tmp_path / "run")["tensors"]["file"])
    assert resumed.keys() == state.keys()
    assert {key for key in state if not torch.equal(resumed[key], state[key])} == set()
    model = load_model(tmp_path / "run")
    assert not model.training
    assert fastgen.fusion_report(model).fusable == ()


def test_weights_stay_clipped():
    recipe = recipe_of(tiny("wgan"))
    for step in range(2):
        recipe.advance(step)
    largest = max(parameter.abs().max().item() for parameter in recipe.model.discriminator.parameters())
    assert largest == pytest.approx(recipe.config.clip_weights)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped(clip, monkeypatch):
    recipe = recipe_of(tiny("dcgan", clip_grad=clip, augment=""))
    norms = []
    for optimizer in recipe.optimizers.values():

        def step(of=optimizer):
            gradients = [parameter.grad for group in of.param_groups for parameter in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())

        monkeypatch.setattr(optimizer, "step", step)
    recipe.advance(0)
    assert len(norms) == 2
    assert max(norms) == pytest.approx(clip, rel=1e-2) if clip else max(norms) > 1e-2


def test_the_learning_rate_falls_to_zero_after_its_share_of_the_steps(monkeypatch):
    recipe = recipe_of(tiny("dcgan", steps=10, lr=1.0, lr_decay_from=0.5))
    monkeypatch.setattr(type(recipe), "step", lambda self, step: {})
    rates = []
    for step in range(10):
        recipe.advance(step)
        rates.append(recipe.optimizers["generator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_each_d_step_draws_new_images():
    recipe = recipe_of(tiny("wgan_gp", d_steps=3))
    recipe.advance(0)
    assert recipe.position == 3 * recipe.config.batch_size


def test_networks_run_in_bf16_and_weights_stay_in_fp32():
    recipe = recipe_of(tiny("dcgan in bf16"))
    seen = set()
    for network in (recipe.model.generator, recipe.model.discriminator):
        network.main[-1].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = recipe.advance(0)
    assert torch.bfloat16 in seen and {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {parameter.dtype for parameter in recipe.model.parameters()} == {torch.float32}


def test_another_images_caption_counts_as_generated():
    recipe = recipe_of(tiny("text2image"))
    (batch,) = recipe.next_batches()
    (conditions,) = recipe.conditions(batch)
    real, fake = recipe.logits(batch.images, -batch.images, batch, (conditions,))
    discriminator, labels = recipe.model.discriminator, batch.labels
    wrong = [at for at in range(4) if labels[at] != labels[at - 1]]
    assert wrong
    torch.testing.assert_close(real, discriminator(batch.images, conditions))
    torch.testing.assert_close(fake[:4], discriminator(-batch.images, conditions))
    expected = [discriminator(batch.images[at : at + 1], conditions[at - 1 : at or None][:1]) for at in wrong]
    torch.testing.assert_close(fake[4:], torch.cat(expected))


def test_the_variance_of_a_vae_is_that_of_its_error():
    recipe = recipe_of(tiny("vae", warm_up=0.0))
    for step in range(5):
        recipe.advance(step)
    random = torch.get_rng_state()
    recipe.finish_average()
    assert torch.equal(torch.get_rng_state(), random), "sampling leaves training alone"
    images = recipe.data.all().images
    error = (recipe.ema.model(images)[0] - images).square().mean()
    assert recipe.ema.model.log_std.exp().item() == pytest.approx(error.sqrt().item(), rel=0.01)
    assert recipe.model.log_std != recipe.ema.model.log_std


DIFFERENCES = units(torch.float32, 2**13, 1)  # of two gradients, which agree in about three of seven digits


def test_beta_weighs_the_divergence_and_grows():
    weights = {}
    for beta, warm_up in ((0.0, 0.0), (4.0, 0.0), (4.0, 1.0)):
        recipe = recipe_of(tiny("vae", beta=beta, warm_up=warm_up, optimizer="sgd", lr=1e-9))
        recipe.advance(0)
        weights[beta, warm_up] = recipe.model.fc_mu.bias.grad.clone()
    plain, whole, ramp = weights.values()
    torch.testing.assert_close(ramp - plain, (whole - plain) / 5, **DIFFERENCES)
    assert (whole - plain).abs().max() > 1e-6


def test_the_pool_gives_back_old_images():
    pool, noise = ImagePool(3, (1, 1, 1)), torch.Generator().manual_seed(0)
    images = torch.arange(40.0).view(40, 1, 1, 1)
    shown = torch.cat([pool(batch, noise) for batch in images.split(2)]).flatten()
    assert torch.equal(shown[:3], images[:3].flatten()), "the pool fills first"
    kept, old = shown == images.flatten(), shown < images.flatten()
    assert (kept | old).all() and 8 <= int(old.sum()) <= 30
    assert sorted([*shown[old].tolist(), *pool.images.flatten().tolist()]) == sorted(
        {*shown[old].tolist(), *pool.images.flatten().tolist()}
    )
    assert torch.equal(ImagePool(0, (1, 1, 1))(images, noise), images)


def test_augmentations_change_each_image_by_itself_and_pass_gradients():
    images = torch.rand(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    for name in ("color", "translation", "cutout"):
        changed = augment(images, [name], torch.Generator().manual_seed(0))
        assert changed.shape == images.shape
        assert torch.equal(changed, augment(images, [name], torch.Generator().manual_seed(0)))
        assert all(not torch.equal(before, after) for before, after in zip(images, changed, strict=True))
        (gradient,) = torch.autograd.grad(changed[0].sum(), images)
        assert gradient[0].any() and not gradient[1:].any()
    moved = augment(images, ["translation"], torch.Generator().manual_seed(0)).detach()
    inner = images.detach()[0, :, 4:12, 4:12]  # moved by at most 2 pixels
    assert any(
        torch.equal(moved[0, :, 4 + y : 12 + y, 4 + x : 12 + x], inner) for y in range(-2, 3) for x in range(-2, 3)
    )
    cut = augment(torch.ones(50, 1, 16, 16), ["cutout"], torch.Generator().manual_seed(0))
    missing = (cut == 0).sum((1, 2, 3))
    assert missing.max() == 64 and missing.min() < 64 and ((cut == 0) | (cut == 1)).all()


def without(data, *names):
    return dataclasses.replace(data, **dict.fromkeys(names))


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        (
            "cgan",
            ("labels", "classes"),
            "cgan learns from labelled images, but digits has no labels: use one folder per class",
        ),
        ("text2image", ("captions",), "digits has none: use a folder with metadata.jsonl"),
        ("cyclegan", (), "cyclegan learns from two domains, but digits is one: use a folder with trainA and trainB"),
    ],
)
def test_data_without_what_a_system_needs(name, lacks, message):
    config = tiny(name, data="digits")
    with pytest.raises(DataError, match=message):
        recipe_of(config, without(load_dataset("digits", 32), *lacks))


@pytest.mark.parametrize("name", ["dcgan", "vae", "gan"])
def test_systems_of_one_set_of_images_refuse_two_domains(name):
    images = ImageDataset("a", torch.zeros(2, 1, 32, 32))
    with pytest.raises(DataError, match="learns from one set of images, but digits has two domains"):
        recipe_of(tiny(name), DomainPair("ab", images, images))


@pytest.mark.parametrize("name", ["gan", "cgan", "text2image", "vae", "vae, mlp", "cyclegan"])
def test_a_single_image_is_data(name):
    config = tiny(name)
    size = config.image_size
    data = ImageDataset(
        "one", torch.full((1, 3, size, size), 255, dtype=torch.uint8), torch.zeros(1).long(), ("a",), ["a"]
    )
    recipe = recipe_of(config, DomainPair("ab", data, data) if name == "cyclegan" else data)
    assert all(loss.isfinite() for loss in recipe.advance(0).values())
    recipe.finish_average()
    assert recipe.sample(9, 0).isfinite().all()


def test_domains_of_other_channels_have_no_identity_loss():
    data = DomainPair("ab", ImageDataset("a", torch.zeros(2, 3, 16, 16)), ImageDataset("b", torch.zeros(3, 1, 16, 16)))
    recipe = recipe_of(tiny("cyclegan"), data)
    losses = recipe.advance(0)
    assert losses.keys() == {"g_loss", "cycle", "d_loss"} and all(math.isfinite(loss) for loss in losses.values())
    assert recipe.sample(6, 0).shape == (6, 3, 16, 16)
