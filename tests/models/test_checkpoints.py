"""Checkpoints of other projects' networks, rebuilt from the tables of their layers, load and give the same results."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastgen
from fastgen.errors import CheckpointError, UsageError
from fastgen.models.checkpoints import DIALECTS
from tests.models.published import NORMS, PUBLISHED, call_unet, published, unet
from tests.support import networks
from tests.support.tolerance import FLOAT32


@pytest.mark.parametrize("name", PUBLISHED)
def test_computes_what_the_original_does(name, tmp_path):
    dialect, _, call_original, shape, called = PUBLISHED[name]
    original = published(name)
    torch.save(original.state_dict(), tmp_path / "net.pth")
    x = torch.randn(shape).tanh()
    for requested in ("auto", dialect):
        network = fastgen.load_checkpoint(tmp_path / "net.pth", requested)
        assert not network.training
        actual = (called(network) if called else network)(x)
        torch.testing.assert_close(actual, call_original(original, x), **FLOAT32)
    expected = call_original(original, x)
    for tensor in original.state_dict().values():
        tensor.zero_()
    original.load_state_dict(network.state_dict())  # the original loads what fastgen saves
    torch.testing.assert_close(call_original(original, x), expected)
    others = [other for other in DIALECTS if other != dialect]
    for other in others:
        with pytest.raises(CheckpointError, match=rf"net\.pth is not of dialect {other}"):
            fastgen.load_checkpoint(tmp_path / "net.pth", other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout", [None, False, True])
def test_dropout_of_a_unet(tmp_path, norm, dropout):
    """By default pix2pix trains with batch norm and dropout, CycleGAN with instance norm and no dropout."""
    original = unet(NORMS[norm], dropout=norm == "batch" if dropout is None else dropout)
    torch.save(original.state_dict(), tmp_path / "net.pth")
    network = fastgen.load_checkpoint(tmp_path / "net.pth", dropout=dropout).train()
    x, images = torch.randn(2, 3, 64, 64), []
    for draw in (network, lambda x: call_unet(original, x)):  # in training mode, in which pix2pix also generates
        torch.manual_seed(0)
        images.append(draw(x))
    torch.testing.assert_close(*images, **FLOAT32)


def test_dropout_that_the_names_show_cannot_be_refused(tmp_path):
    torch.save(networks.ResnetGenerator(use_dropout=True).state_dict(), tmp_path / "net.pth")
    fastgen.load_checkpoint(tmp_path / "net.pth", dropout=True)
    with pytest.raises(UsageError, match=r"dropout must be True or left out for .*net\.pth: the names"):
        fastgen.load_checkpoint(tmp_path / "net.pth", dropout=False)
    with pytest.raises(UsageError, match="dropout must be True, False or None, not 'no'"):
        fastgen.load_checkpoint(tmp_path / "net.pth", dropout="no")


@pytest.mark.parametrize("name", ["netG", "PyTorch-VAE", "examples vae", "CycleGAN"])
def test_the_process_s_defaults_change_nothing(tmp_path, name):
    original = published(name)
    torch.save(original.state_dict(), tmp_path / "net.pth")
    save_file(original.state_dict(), tmp_path / "net.safetensors")
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        loaded = [fastgen.load_checkpoint(tmp_path / f"net.{suffix}") for suffix in ("pth", "safetensors")]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for network in loaded:
        for tensor in (*network.parameters(), *network.buffers()):
            assert tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64)
        for key, value in original.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)


def test_vae_states_go_both_ways(tmp_path):
    """The state of a model that fastgen created has `log_std`; that of the original, and of a loaded model, does
    not."""
    original = published("PyTorch-VAE")
    torch.save(original.state_dict(), tmp_path / "net.pth")
    loaded = fastgen.load_checkpoint(tmp_path / "net.pth")
    assert loaded.log_std == 0 and "log_std" not in loaded.state_dict()
    network = fastgen.create_model("vae", image_size=16, nz=5, widths=(4, 6, 8))
    network.log_std.fill_(-2)
    assert network.state_dict()["log_std"] == -2
    network.load_state_dict(original.state_dict())
    network.load_state_dict(loaded.state_dict())
    assert network.log_std == -2
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(network.eval().encode(images), loaded.encode(images))


def test_wrapped_prefixed_sorted_and_with_old_statistics(tmp_path):
    original = published("CycleGAN")
    state = original.state_dict()
    expected = original(x := torch.randn(1, 3, 16, 16))
    old = dict(state)
    for name, module in original.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            old |= {
                f"{name}.running_mean": torch.ones(module.num_features),
                f"{name}.num_batches_tracked": torch.tensor(9),
            }
    forms = {
        "sorted": dict(sorted(state.items(), reverse=True)),
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "wrapped": {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()}},
        "old": old,
        "double": {name: value.double() for name, value in state.items()},
    }
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pth")
        network = fastgen.load_checkpoint(tmp_path / f"{name}.pth")
        torch.testing.assert_close(network(x), expected, **FLOAT32)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "net.safetensors")
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "net.safetensors")(x), expected, **FLOAT32)
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "legacy.pth")(x), expected, **FLOAT32)


def test_fastgens_own_checkpoints_load_too(tmp_path):
    model = fastgen.create_model(
        "dcgan", image_size=32, channels=1, nz=4, ngf=2, ndf=2, discriminator_norm="none"
    ).eval()
    images = model.sample(2)
    save_file(
        {name: value.contiguous() for name, value in model.discriminator.state_dict().items()},
        tmp_path / "d.safetensors",
    )
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "d.safetensors")(images), model.discriminator(images))


def test_an_unknown_dialect(tmp_path):
    with pytest.raises(
        UsageError, match="unknown dialect 'cyclegan': choose from: auto, pytorch-cyclegan-and-pix2pix, "
    ):
        fastgen.load_checkpoint(tmp_path / "net.pth", "cyclegan")
