"""What surrounds a network in a file, which of several networks is loaded, and unusable files."""

import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastgen
from fastgen.errors import CheckpointError, UsageError
from tests.models.published import ExamplesVAE, published, unet
from tests.support import networks
from tests.support.tolerance import FLOAT32


def wrapped(state, *prefixes):
    return {".".join((*prefixes, name)): value for name, value in state.items()}


def averaged(state):
    return {"n_averaged": torch.tensor(3)} | wrapped(state, "module")


# name -> the form in which some trainer saves the state_dict of a network with batch norm
FORMS = {
    "before PyTorch 0.4.1": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "compiled, then parallel": lambda state: wrapped(state, "module", "_orig_mod"),
    "parallel, then compiled": lambda state: wrapped(state, "_orig_mod", "module"),
    "parallel in Lightning, compiled": lambda state: {"state_dict": wrapped(state, "_orig_mod", "model", "module")},
    "compiled and parallel within": lambda state: {
        k.replace("main.", "main._orig_mod.module."): v for k, v in state.items()
    },
    "averaged": averaged,
    "averaged of a part": lambda state: {"ema": averaged(state), "decay": 0.99},
    "deep": lambda state: {"nets": [{"generator": {"params": state}}]},
    "with an optimizer": lambda state: {
        "netG": state,
        "epoch": 3,
        "sigma": torch.tensor(0.5),
        "losses": [0.1] * 9,
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(3)}},
            "param_groups": [{"params": [0], "betas": (0.5, 0.999)}],
        },
    },
    "beside numbers": lambda state: {**state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "beside other tensors": lambda state: {
        "state_dict": wrapped(state, "G") | {"sigma": torch.ones(3), "a.b": torch.ones(2)}
    },
    "twice the same": lambda state: {"model": state, "best": state},
    "parameters": lambda state: {
        k: nn.Parameter(v, requires_grad=False) if v.is_floating_point() else v for k, v in state.items()
    },
    "not contiguous": lambda state: {k: torch.stack([v, v], -1)[..., 0] for k, v in state.items()},
    "channels last": lambda state: {
        k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in state.items()
    },
    "bfloat16": lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
    "counters averaged": lambda state: {k: v.float() for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_file(tmp_path, form):
    original = published("netG")
    with torch.no_grad():
        for tensor in original.state_dict().values():
            tensor.copy_(tensor.bfloat16())  # so that rounding changes nothing
    content = FORMS[form](original.state_dict())
    torch.save(content, tmp_path / "net.pth")
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {name: value.detach().clone().contiguous() for name, value in content.items()}
        save_file(content, tmp_path / "net.safetensors")
        save_file(content, tmp_path / "net.bin")
    z = torch.randn(2, 6, 1, 1)
    for path in tmp_path.iterdir():
        network = fastgen.load_checkpoint(path)
        tensors = [*network.parameters(), *network.buffers()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
        assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
        assert all(parameter.requires_grad for parameter in network.parameters())
        torch.testing.assert_close(network(z), original(z), **FLOAT32)


def several(path):
    netG, netD = published("netG").state_dict(), published("netD").state_dict()
    nets = {"G": netG, "D": netD}
    torch.save({"nets": nets, "ema": {"G": averaged(netG)}, "all": wrapped(netG, "gen") | wrapped(netD, "disc")}, path)


def test_one_of_several_networks(tmp_path):
    path = tmp_path / "all.pth"
    several(path)
    listed = (
        r"all\.pth holds 5 networks: 'all\.gen' \(pytorch-examples-dcgan\), 'all\.disc' .*, 'nets\.G' .*, "
        r"'nets\.D' .*, "
        r"'ema\.G' \(pytorch-examples-dcgan\)\. Say which with the argument network='all\.gen'"
    )
    with pytest.raises(CheckpointError, match=listed):
        fastgen.load_checkpoint(path)
    for name in ("nets.G", "all.gen", "gen", "ema", "ema.G"):
        assert isinstance(fastgen.load_checkpoint(path, network=name), fastgen.models.DCGANGenerator)
    for name in ("nets.D", "D", "disc"):
        assert isinstance(fastgen.load_checkpoint(path, network=name), fastgen.models.DCGANDiscriminator)
    with pytest.raises(CheckpointError, match=r"holds 2 networks: 'nets\.G' .*, 'ema\.G' "):
        fastgen.load_checkpoint(path, network="G")
    with pytest.raises(
        UsageError, match=r"unknown network 'nets\.g': did you mean .*choose from: all\.disc, all\.gen, ema\.G, "
    ):
        fastgen.load_checkpoint(path, network="nets.g")
    with pytest.raises(UsageError, match="network must be a name, not 3"):
        fastgen.load_checkpoint(path, network=3)
    torch.save({**published("netG").state_dict(), "ema": averaged(published("netG").state_dict())}, path)
    assert fastgen.load_checkpoint(path, network="")(torch.zeros(1, 6)).shape == (1, 3, 64, 64)


def test_networks_in_a_training_file_are_named(tmp_path):
    model = fastgen.create_model("dcgan", image_size=32, channels=1, nz=4, ngf=2, ndf=2)
    ema = {name: value.clone() for name, value in wrapped(model.generator.state_dict(), "ema.generator").items()}
    save_file(wrapped(model.state_dict(), "model") | ema, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"'ema\.generator' .*'model\.discriminator' .*'model\.generator' "):
        fastgen.load_checkpoint(tmp_path / "c.safetensors")
    fastgen.load_checkpoint(tmp_path / "c.safetensors", network="ema")


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    torch.save({"main.0.weight": Hostile()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(), 2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name} holds more than tensors, or is damaged; none of its code was run"
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


class Thing:
    pass


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in use
        torch.jit.trace(networks.DCGANGenerator().eval(), torch.zeros(1, 6, 1, 1)).save(str(path))


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "no checkpoint")


def changed(make, **tensors):
    """A file of a network's state_dict with other tensors; None removes one. Two underscores stand for a dot."""

    def write(path):
        state = make().state_dict() | {name.replace("__", "."): value for name, value in tensors.items()}
        torch.save({name: value for name, value in state.items() if value is not None}, path)

    return write


def zeros(*shape):
    return torch.zeros(shape)


NETG, VAE, MLP = networks.DCGANGenerator, networks.VanillaVAE, ExamplesVAE
RESNET, PATCH, PIXEL = networks.ResnetGenerator, networks.PatchGAN, networks.PixelDiscriminator
# name -> (function that writes the file, the error message)
UNUSABLE = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a folder": (lambda path: path.mkdir(), r"cannot be read: Is a directory; fastgen\.training\.load_model reads"),
    "empty": (lambda path: path.write_bytes(b""), "is not a checkpoint: it is empty"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 1000), r"net\.pth is damaged, or not a checkpoint \("),
    "a web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html>"), "is not a checkpoint, but a web page"),
    "Git LFS": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    ),
    "cut short": (cut, r"net\.pth is damaged, or not a checkpoint \("),
    "compressed": (compressed, "is compressed, which torch.save never does"),
    "TorchScript": (script, r"a TorchScript program, which is not run: save torch\.jit\.load\(\.\.\.\)\.state_dict"),
    "an archive": (archive, r"an archive that torch\.save did not write: it has no data\.pkl"),
    "a whole module": (
        lambda path: torch.save(NETG(), path),
        r"none of its code was run \(it names tests\.support\.networks\.DCGANGenerator\)\. If you trust it, save "
        r"only the network's state_dict\(\) and load that",
    ),
    "settings beside": (
        lambda path: torch.save({"args": Thing(), "netG": NETG().state_dict()}, path),
        r"it names .*\.Thing",
    ),
    "a list": (
        lambda path: torch.save([1, 2], path),
        "is not of a known dialect .*: it holds no tensors by name, but a list",
    ),
    "a tensor": (lambda path: torch.save(zeros(3), path), "it holds no tensors by name, but a Tensor"),
    "nothing": (lambda path: torch.save({}, path), "it holds no tensors by name, but a dict"),
    "in itself": (lambda path: torch.save((loop := [1], loop.append(loop))[0], path), "no tensors by name, but a list"),
    "unknown": (
        lambda path: torch.save({"weight": zeros(1)}, path),
        "is not of a known dialect .*: its tensors are weight",
    ),
    "unknown networks": (
        lambda path: torch.save({"netG": {"a.weight": zeros(1)}, "netD": {"b.weight": zeros(1)}}, path),
        r"its tensors are a\.weight, \.\.\. in 'netG'; b\.weight, \.\.\. in 'netD'",
    ),
    "another network": (lambda path: torch.save({"main.0.weight": zeros(2)}, path), "is not of a known dialect"),
    "large": (
        changed(NETG, main__0__weight=torch.zeros(1).expand(10**6, 10**6, 4, 4)),
        r"main\.0\.weight is larger than its",
    ),
    "besides": (
        changed(NETG, main__99__bias=zeros(1)),
        r"looks like pytorch-examples-dcgan, but is not: it has main\.99\.bias too",
    ),
    "sigma too": (changed(NETG, sigma=zeros(1)), "it has sigma too"),
    "other shape": (
        changed(NETG, main__3__weight=zeros(1, 1, 1, 1)),
        r"main.3.weight is \(1, 1, 1, 1\), not \(32, 16, 4, 4\)",
    ),
    "too small": (
        lambda path: torch.save({"main.0.weight": zeros(2, 2, 4, 4)}, path),
        "but is not: image_size must be",
    ),
    "no statistics": (changed(NETG, main__1__running_var=None), r"it has no main\.1\.running_var"),
    "integers": (
        changed(NETG, main__0__weight=zeros(6, 32, 4, 4).char()),
        r"main\.0\.weight is of torch\.int8 and torch\.str",
    ),
    "sparse": (
        changed(NETG, main__0__weight=zeros(6, 32, 4, 4).to_sparse()),
        r"main\.0\.weight is of .* torch\.sparse_coo",
    ),
    "in a file of several": (
        lambda path: torch.save({"netG": {"main.0.weight": zeros(2, 2, 4, 4)}}, path),
        r"'netG' in .*net\.pth looks like pytorch-examples-dcgan, but is not: image_size",
    ),
    "twice": (
        lambda path: torch.save({"main.0.weight": zeros(1), "module.main.0.weight": zeros(1)}, path),
        r"net\.pth holds main\.0\.weight twice, once as module\.main\.0\.weight",
    ),
    "vae of no square": (changed(lambda: ExamplesVAE(785)), "its 785 pixels are not a square image of 1 or 3 channels"),
    "vae without a layer": (changed(MLP, fc1__bias=None), r"it has no fc1\.bias"),
    "vae of no square of features": (changed(VAE, fc_mu__weight=zeros(5, 33)), "fc_mu.weight takes 33 features"),
    "vae, no last layer": (changed(VAE, final_layer__3__weight=None), r"it has no final_layer\.3\.weight"),
    "conditional vae": (changed(VAE, embed_class__weight=zeros(3, 3)), r"it has embed_class\.weight too"),
    "resnet cut": (changed(lambda: RESNET(blocks=1), model__18__weight=None), r"it has no model\.18\.weight"),
    "resnet without blocks": (
        lambda path: torch.save({"model.1.weight": zeros(4, 3, 7, 7), "model.4.weight": zeros(8, 4, 3, 3)}, path),
        r"it has no model\.17\.weight",
    ),
    "resnet, zero padding": (
        changed(RESNET, model__10__conv_block__0__weight=zeros(16, 16, 3, 3)),
        "its blocks pad with zeros .* by reflection",
    ),
    "antialiased": (
        changed(RESNET, model__7__filt=zeros(8, 1, 3, 3)),
        r"it has blurring resampling layers \(\.filt\)",
    ),
    "resnet of wrong rank": (changed(RESNET, model__19__weight=zeros(3)), r"model\.19\.weight is \(3,\)"),
    "unet of one layer": (
        lambda path: torch.save(
            {"model.model.0.weight": zeros(2, 3, 4, 4), "model.model.3.weight": zeros(4, 3, 4, 4)}, path
        ),
        r"it has no model\.model\.1\.model\.1\.weight",
    ),
    "unet, damaged": (
        changed(unet, model__model__1__model__5__weight=None),
        r"it has no model\.model\.1\.model\.5\.weight",
    ),
    "patchgan of no channels": (
        changed(PATCH, model__0__weight=zeros(4, 0, 4, 4)),
        r"model\.0\.weight is \(4, 0, 4, 4\)",
    ),
    "pixel, other outputs": (
        changed(PIXEL, net__5__weight=zeros(2, 8, 1, 1)),
        r"net\.5\.weight is \(2, 8, 1, 1\), not \(1, 8",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files(tmp_path, name):
    write, message = UNUSABLE[name]
    write(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        fastgen.load_checkpoint(tmp_path / "net.pth")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      ", b"\xff" * 7 + b"\x7f{}"])
def test_hostile_safetensors(tmp_path, content):
    (tmp_path / "net.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        fastgen.load_checkpoint(tmp_path / "net.safetensors")
