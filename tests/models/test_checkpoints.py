"""Networks of other projects, rebuilt from the tables of their layers, load and compute the same."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastgen
from fastgen.errors import CheckpointError, UsageError
from fastgen.models.checkpoints import DIALECTS
from tests.inference import networks


class ExamplesVAE(nn.Module):
    """pytorch/examples vae: `fc1, fc21, fc22, fc3, fc4`; pixels in [0, 1]."""

    def __init__(self, pixels=784, width=10, nz=4):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(pixels, width), nn.Linear(width, nz), nn.Linear(width, nz)
        self.fc3, self.fc4 = nn.Linear(nz, width), nn.Linear(width, pixels)

    def encode(self, x):
        h = self.fc1(x).relu()
        return self.fc21(h), self.fc22(h)

    def forward(self, x):
        mu, _ = self.encode(x.flatten(1))
        return self.fc4(self.fc3(mu).relu()).sigmoid().view_as(x)


class MeanVanillaVAE(networks.VanillaVAE):
    def forward(self, x):
        return self.decode(self.encode(x)[0])


def unet(norm=nn.BatchNorm2d, dropout=False):
    block = networks.UnetBlock(16, 16)
    for outer, inner in ((16, 16), (8, 16), (4, 8), (2, 4)):
        block = networks.UnetBlock(outer, inner, block, dropout=dropout and outer == 16)
    return nn.ModuleDict({"model": networks.UnetBlock(3, 2, block, outermost=True)})


def mean_of(vae):
    return lambda images: vae.decode(vae.encode(images)[0])


# name -> (dialect, their network, how it is called, the shape of its input, how ours is called)
PUBLISHED = {
    "netG": ("pytorch-examples-dcgan", lambda: networks.DCGANGenerator(), nn.Module.__call__, (3, 6, 1, 1), None),
    "netD": (
        "pytorch-examples-dcgan", lambda: networks.DCGANDiscriminator(pixels=64), nn.Module.__call__, (3, 3, 64, 64),
        lambda network: network.probability,
    ),
    "netD, 32 pixels": (
        "pytorch-examples-dcgan", networks.DCGANDiscriminator, nn.Module.__call__, (3, 3, 32, 32),
        lambda network: network.probability,
    ),
    "examples vae": (
        "pytorch-examples-vae", ExamplesVAE, lambda network, x: 2 * network((x + 1) / 2) - 1, (3, 1, 28, 28), mean_of
    ),
    "PyTorch-VAE": ("pytorch-vae", MeanVanillaVAE, nn.Module.__call__, (3, 3, 16, 16), mean_of),
    "CycleGAN": (
        "pytorch-cyclegan-and-pix2pix", lambda: networks.ResnetGenerator(blocks=6), nn.Module.__call__, (2, 3, 16, 20), None,
    ),
    "CycleGAN with dropout": (
        "pytorch-cyclegan-and-pix2pix", lambda: networks.ResnetGenerator(use_dropout=True), nn.Module.__call__, (2, 3, 16, 16),
        None,
    ),
    "PatchGAN": ("pytorch-cyclegan-and-pix2pix", networks.PatchGAN, nn.Module.__call__, (2, 3, 32, 32), None),
    "PatchGAN, instance norm": (
        "pytorch-cyclegan-and-pix2pix", lambda: networks.PatchGAN(nn.InstanceNorm2d), nn.Module.__call__, (2, 3, 32, 32), None,
    ),
    "pix2pix": (
        "pytorch-cyclegan-and-pix2pix", lambda: unet(dropout=True), lambda network, x: network["model"](x), (2, 3, 64, 64),
        None,
    ),
}  # fmt: skip


def published(name):
    torch.manual_seed(0)
    network = PUBLISHED[name][1]()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    return network.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_computes_what_the_original_does(name, tmp_path):
    dialect, _, theirs_called, shape, called = PUBLISHED[name]
    theirs = published(name)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    x = torch.randn(shape).tanh()
    for asked in ("auto", dialect):
        network = fastgen.load_checkpoint(tmp_path / "net.pth", asked)
        assert not network.training
        ours = (called(network) if called else network)(x)
        torch.testing.assert_close(ours, theirs_called(theirs, x), rtol=1e-4, atol=1e-5)
    if name == "pix2pix":  # which draws with the batch's statistics unless told otherwise; dropout is off to compare
        for network_or_theirs in (network, theirs):
            for module in network_or_theirs.modules():
                module.training = isinstance(module, nn.BatchNorm2d)
        torch.testing.assert_close(network(x), theirs_called(theirs, x), rtol=1e-4, atol=1e-5)
    state = network.state_dict()
    assert set(theirs.state_dict()) == set(state) - {"log_std"}
    others = [other for other in DIALECTS if other != dialect]
    for other in others:
        with pytest.raises(CheckpointError, match=rf"net\.pth is not of dialect {other}"):
            fastgen.load_checkpoint(tmp_path / "net.pth", other)


def test_wrapped_prefixed_sorted_and_with_old_statistics(tmp_path):
    theirs = published("CycleGAN")
    state = theirs.state_dict()
    expected = theirs(x := torch.randn(1, 3, 16, 16))
    old = dict(state)
    for name, module in theirs.named_modules():
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
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "net.safetensors")
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "net.safetensors")(x), expected, rtol=1e-4, atol=1e-5)
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "legacy.pth")(x), expected, rtol=1e-4, atol=1e-5)


def test_what_fastgen_trained_loads_too(tmp_path):
    model = fastgen.create_model(
        "dcgan", image_size=32, channels=1, nz=4, ngf=2, ndf=2, discriminator_norm="none"
    ).eval()
    images = model.sample(2)
    save_file(
        {name: value.contiguous() for name, value in model.discriminator.state_dict().items()},
        tmp_path / "d.safetensors",
    )
    torch.testing.assert_close(fastgen.load_checkpoint(tmp_path / "d.safetensors")(images), model.discriminator(images))


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    torch.save({"main.0.weight": Hostile()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(), 2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name} holds more than tensors, or is damaged; nothing of it was run"
        ):
            fastgen.load_checkpoint(tmp_path / name)
    assert capsys.readouterr().out == ""


def compressed(path):
    torch.save({"main.0.weight": torch.zeros(1000, 1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def cut(path):
    torch.save(published("netG").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b""), "is no checkpoint"),
        (lambda path: path.write_bytes(b"\0" * 1000), "net.pth"),
        (lambda path: path.write_bytes(b"<html>"), "net.pth"),
        (cut, "net.pth"),
        (compressed, "is compressed, which torch.save never does"),
        (lambda path: torch.save([1, 2], path), "holds no tensors by name, but a list"),
        (lambda path: torch.save({}, path), "is not of a known dialect"),
        (
            lambda path: torch.save({"weight": torch.zeros(1)}, path),
            "is not of a known dialect .*: its tensors are weight",
        ),
        (
            lambda path: torch.save({"main.0.weight": torch.zeros(1).expand(10**6, 10**6, 4, 4)}, path),
            "main.0.weight is larger than its data",
        ),
        (
            lambda path: torch.save({**networks.DCGANGenerator().state_dict(), "main.99.bias": torch.zeros(1)}, path),
            "looks like pytorch-examples-dcgan and is not: it has main.99.bias besides",
        ),
        (
            lambda path: torch.save(
                {**networks.DCGANGenerator().state_dict(), "main.3.weight": torch.zeros(1, 1, 1, 1)}, path
            ),
            r"and is not: main.3.weight is \(1, 1, 1, 1\), not \(32, 16, 4, 4\)",
        ),
        (lambda path: torch.save({"main.0.weight": torch.zeros(2, 2, 4, 4)}, path), "and is not: image_size must be"),
        (
            lambda path: torch.save({"main.0.weight": torch.zeros(2)}, path),
            "looks like pytorch-examples-dcgan and is not",
        ),
    ],
    ids=range(15),
)
def test_files_of_no_use(tmp_path, write, message):
    write(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        fastgen.load_checkpoint(tmp_path / "net.pth")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      ", b"\xff" * 7 + b"\x7f{}"])
def test_hostile_safetensors(tmp_path, content):
    (tmp_path / "net.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        fastgen.load_checkpoint(tmp_path / "net.safetensors")


def test_an_unknown_dialect(tmp_path):
    with pytest.raises(UsageError, match="unknown dialect 'cyclegan': there are: auto, pytorch-cyclegan-and-pix2pix, "):
        fastgen.load_checkpoint(tmp_path / "net.pth", "cyclegan")
