"""What fuse replaces besides runs of layers: both of PyTorch's spectral norms, and the samplers that a model
declares."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, remove_spectral_norm
from torch.nn.utils import spectral_norm as old_spectral_norm

import fastgen
import fastgen.nn
from tests.inference.parity import FLOAT32, NETWORK, assert_close, assert_same_state

pytestmark = pytest.mark.usefixtures("fused_when_small")

# For weights under spectral norm: sums of large terms that nearly cancel, after up to three steps of power iteration.
GRADIENT = {"rtol": 1e-3, "atol": 1e-4}
FORMS = {"parametrization": parametrizations.spectral_norm, "hook": old_spectral_norm}


def discriminator(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.ConvTranspose2d(8, 4, 3), n_power_iterations=2),
        nn.Flatten(), norm(nn.Linear(4 * 6 * 6, 1)),
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inplace", (False, True))
def test_spectral_norm_is_swapped(form, inplace):
    """Outputs, gradients and state_dict are the same at each step, in both modes, and state_dicts load both ways."""
    plain = discriminator(FORMS[form])
    before = fastgen.fusion_report(plain)
    assert [run.names[0] for run in before.swappable] == ["0.weight", "2.weight", "4.weight"] and not before.swapped
    fused = fastgen.fuse(copy.deepcopy(plain), inplace=inplace)
    after = fastgen.fusion_report(fused)
    assert [run.names for run in after.swapped] == [run.names for run in before.swappable] and not after.swappable
    assert "swapped (3)" in str(after) and {run.op for run in after.swapped} == {"spectral_norm"}
    assert [run.names for run in after.fused] == [("0", "1")]
    for training in (True, True, False):
        x = torch.randn(2, 3, 8, 8)
        for model in (plain, fused):
            model.train(training).zero_grad()
            (model(x) - model(x + 1)).square().sum().backward()
        for (name, a), (other, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
            assert name == other
            torch.testing.assert_close(a.grad, b.grad, **GRADIENT)
        assert list(plain.state_dict()) == list(fused.state_dict())
        torch.testing.assert_close(plain.state_dict(), fused.state_dict(), **NETWORK)
    discriminator(FORMS[form]).load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    assert fastgen.fusion_report(fastgen.fuse(fused)).swapped == after.swapped
    if form == "hook":
        torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(x), fused(x))
        assert "weight" in dict(remove_spectral_norm(fused[0]).named_parameters())


def test_the_hook_of_spectral_norm_on_fused_modules():
    """Files from before PyTorch 1.0, replicas of DataParallel, copies and removal work."""
    plain = nn.Sequential(old_spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.Tanh())
    fused, x = fastgen.fuse(plain), torch.randn(2, 3, 8, 8)
    twins = copy.deepcopy((fused, plain))
    for _ in range(2):  # one step each
        assert_close(replica(fused)(x), replica(plain)(x), FLOAT32, "a replica")
        assert_close(fused(x), plain(x), FLOAT32, "itself")
        assert_same_state(fused, plain, FLOAT32)
    assert_close(twins[0](x), twins[1](x), FLOAT32, "a copy, which has made no steps")
    old = {name: value for name, value in plain.state_dict().items() if not name.endswith("weight_v")}
    old["0.weight"] = plain[0].weight.detach()
    for model in (fused, plain):
        model.load_state_dict(old)
        remove_spectral_norm(model[0])
    assert_close(fused(x), plain(x), FLOAT32, "without")
    assert [len(run.names) for run in fastgen.fusion_report(fused).fused] == [3]


def replica(module):
    """As torch.nn.parallel.replicate makes them."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(made, name, parameter if parameter is None else parameter.detach())
    made._modules = {name: replica(child) for name, child in module._modules.items()}
    return made


class Encoder(nn.Module):
    def __init__(self, declared):
        super().__init__()
        self.heads = nn.Linear(4, 6)
        self.sample = fastgen.nn.Reparameterize() if declared else None

    def forward(self, x):
        mu, logvar = self.heads(x).chunk(2, 1)
        if self.sample is not None:
            return self.sample(mu, logvar)
        std = (0.5 * logvar).exp()
        return mu + std * torch.randn_like(std)


def test_samplers_are_declared_not_guessed():
    report = fastgen.fusion_report(Encoder(declared=True))
    assert [(run.names, run.op) for run in report.swapped] == [(("sample",), "reparameterize")]
    model = Encoder(declared=False)
    assert not fastgen.fusion_report(model).swapped
    fused, x = fastgen.fuse(model), torch.randn(3, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(fused(x), expected)  # the same noise as without fuse
