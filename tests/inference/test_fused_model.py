"""A fused model is a module like any other: copied, saved, converted, changed."""

import contextlib
import copy
import functools
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastgen
from tests.inference.argument_patterns import RefusalBeforeOtherCalls
from tests.inference.layers import PATTERNS, ConvNormAct
from tests.inference.parity import FLOAT32, FLOAT64, TOLERANCE, assert_close, assert_same_calls, assert_same_state
from tests.inference.patterns import VALUE, Attributes, OneActivationForTwoRuns
from tests.support.networks import NETWORKS, DCGANDiscriminator, DCGANGenerator, PatchGAN

ROUNDINGS = 1e-12  # of float64, where one layer is compared
LAYER = 1e-5  # about 100 roundings of float32
AUTOCAST = 0.1  # some 25 roundings to bfloat16: the modules round between a run's layers, the op does not

pytestmark = pytest.mark.usefixtures("fused_when_small")

MODELS = {
    "attributes": (OneActivationForTwoRuns, (2, 4, 6, 6)),
    "subclass": (lambda: nn.Sequential(ConvNormAct(4, nn.SiLU()), nn.Conv2d(4, 4, 1), nn.Tanh()), (2, 4, 6, 6)),
    **{name: NETWORKS[name][:2] for name in ("dcgan_g", "cyclegan", "unet", "sngan")},
}


@pytest.fixture(params=MODELS)
def pair(request):
    """The fused model, the plain one, and an input."""
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    return fastgen.fuse(model), model, torch.rand(shape) * 2 - 1


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def pickled_by_protocol_0(model):
    return pickle.loads(pickle.dumps(model, 0))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, pickled_by_protocol_0, saved_and_loaded])
def test_copies_are_fused_and_independent(pair, copied):
    fused, plain, x = pair
    twin = copied(fused)
    assert fastgen.fusion_report(twin) == fastgen.fusion_report(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    for parameter in fused.parameters():  # the copy has its own
        nn.init.zeros_(parameter)
    assert_same_calls(twin, plain, x, FLOAT32)


def test_a_part_can_be_copied(pair):
    fused, plain, _ = pair
    for part, of in zip(fused.children(), plain.children(), strict=True):
        assert_same_state(copy.deepcopy(part), of, 0.0)
        assert_same_state(pickle.loads(pickle.dumps(part)), of, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_conversion(pair, dtype):
    fused, plain, x = pair
    fused = fused.half() if dtype == torch.float16 else fused.to(dtype)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    with torch.no_grad():
        plain = plain.double().eval()
        plain.load_state_dict(fused.state_dict())
        output = fused.eval()(x.to(dtype))
        assert output.dtype == dtype
        assert_close(output.double(), plain(x.to(dtype).double()), 16 * torch.finfo(dtype).eps, "output")


def test_channels_last(pair):
    fused, plain, x = pair
    layout = torch.channels_last
    x = (x.to(memory_format=layout) if x.dim() == 4 else x).double()
    assert_same_calls(fused.double().to(memory_format=layout), plain.double().to(memory_format=layout), x, FLOAT64)


def test_autocast(pair):
    fused, plain, x = pair
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(x), plain(x)
    assert found.dtype in (torch.bfloat16, expected.dtype)
    assert_close(found.float(), expected.float(), AUTOCAST, "output")
    assert fused.state_dict().keys() == plain.state_dict().keys()


def without_batch_norm():
    return nn.Sequential(*(m for m in DCGANDiscriminator().main if not isinstance(m, nn.BatchNorm2d)))


@pytest.mark.parametrize("make", [lambda: PatchGAN(nn.InstanceNorm2d), without_batch_norm, Attributes])
def test_gradient_penalty(make):
    torch.manual_seed(0)
    plain = make().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, next(plain.parameters()).shape[1], 32, 32, dtype=torch.double)
    grads = []
    for model in (fused, plain):
        input = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(input).sum(), input, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()
        grads.append([input.grad, *(p.grad for p in model.parameters())])
    for i, (found, expected) in enumerate(zip(*grads, strict=True)):
        assert_close(found, expected, FLOAT64, f"gradient {i}")


@pytest.mark.parametrize("name", ["c1", "b1", "act", "c2"])
def test_hooks_added_later_see_what_they_saw(name):
    plain = OneActivationForTwoRuns().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6, dtype=torch.double)
    seen = {fused: [], plain: []}

    def hook(model, module, args, output):
        seen[model].append(output.clone())
        return output * 2

    handles = [m.get_submodule(name).register_forward_hook(functools.partial(hook, m)) for m in (fused, plain)]
    assert_close(fused(x), plain(x), FLOAT64, name)
    assert len(seen[fused]) == (2 if name == "act" else 1)
    for found, expected in zip(*seen.values(), strict=True):
        assert_close(found, expected, FLOAT64, name)
    assert name in {entry.name for entry in fastgen.fusion_report(fused).left}
    for handle in handles:
        handle.remove()
    assert_same_calls(fused, plain, x, FLOAT64)


@pytest.mark.parametrize("make", [Attributes, lambda: nn.Sequential(*list(Attributes().children())[::2])])
def test_modules_replaced_later(make):
    torch.manual_seed(0)
    plain = make().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6, dtype=torch.double)
    norm = next(name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d))
    for model in (fused, plain):
        setattr(model, norm, nn.BatchNorm2d(4, eps=0.5).double())
    assert_same_calls(fused, plain, x, FLOAT64)
    assert_same_calls(fastgen.fuse(fused, inplace=True), plain, x, FLOAT64)
    assert not fastgen.fusion_report(fused).fusable
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    assert_close(converted(x), plain.eval()(x), FLOAT64, "output")


class ConditionalNorm(nn.BatchNorm2d):
    def forward(self, x, y=1.0):
        return super().forward(x) * y


def test_a_norm_that_takes_a_label_comes_later():
    """The path that calls it with a label always raised when the model was fused."""
    plain = RefusalBeforeOtherCalls().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6, dtype=torch.double)
    for model in (fused, plain):
        model.b1 = ConditionalNorm(4).double()
    assert_close(fused(x, VALUE), plain(x, VALUE), FLOAT64, "with a label")
    assert_same_calls(fused, plain, x, FLOAT64)


@contextlib.contextmanager
def default_dtype_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "float64": default_dtype_float64,
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "name", ["Attributes", "HooksThatComputeWeights", "hooks_that_compute_weights_in_a_sequential"]
)
def test_process_wide_settings(state, name):
    """Process-wide settings do not change fusing, and under them a fused model computes what the modules compute."""
    torch.manual_seed(0)
    plain, x = PATTERNS[name][0](), torch.randn(2, 4, 6, 6)
    with STATES[state]():
        fused = fastgen.fuse(plain)
        assert fastgen.fusion_report(fused).fused
        if state != "meta":
            found, expected = fused(x), plain(x)
            assert found.dtype == expected.dtype
            assert_close(found.float(), expected.float(), AUTOCAST / 2 if state == "autocast" else FLOAT32, "output")
            fused.load_state_dict(plain.state_dict())
    assert_same_calls(fused, plain, x, TOLERANCE[x.dtype])


def test_spectral_norm_advances_once_a_forward():
    torch.manual_seed(0)
    plain = Attributes().double()
    parametrizations.spectral_norm(plain.c1)
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6, dtype=torch.double)
    for _ in range(3):
        fused(x), plain(x)
        assert_same_state(fused, plain, ROUNDINGS)
    for model in (fused, plain):  # parametrizations are registered and removed on fused modules
        parametrizations.spectral_norm(model.c2)
    fused.load_state_dict(plain.state_dict())
    assert_same_calls(fused, plain, x, FLOAT64)
    for model in (fused, plain):
        parametrize.remove_parametrizations(model.c1, "weight")
    assert_same_calls(fused, plain, x, FLOAT64)
    assert len(fastgen.fusion_report(fused).fused) == 2 and type(fused.c1).__name__ == "Conv2d"


def test_inplace_keeps_the_objects():
    model = DCGANGenerator()
    modules, parameters = list(model.modules()), list(model.parameters())
    assert fastgen.fuse(model, inplace=True) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model.main, nn.Sequential) and len(fastgen.fusion_report(model).fused) == 5


def test_initialisation_by_class_name():
    def init(module):  # pytorch/examples dcgan
        name = module.__class__.__name__
        if name.find("Conv") != -1:
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif name.find("BatchNorm") != -1:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    for make in (DCGANGenerator, OneActivationForTwoRuns):
        torch.manual_seed(0)
        plain = make()
        fused = fastgen.fuse(plain)
        for model in (fused, plain):
            torch.manual_seed(1)
            model.apply(init)
        assert_same_state(fused, plain, 0.0)
        assert repr(fused) == repr(plain)


def test_parts_of_a_sequential_stay_themselves():
    plain = DCGANGenerator().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, 6, 1, 1, dtype=torch.double)
    for end in range(1, 6):
        assert_close(fused.main[:end](x), plain.main[:end](x), FLOAT64, f"the first {end}")
        assert_same_state(fused, plain, FLOAT64)
    assert_close(fused.main[0](x), plain.main[0](x), ROUNDINGS, "the first")


def test_other_parameters_and_replicas():
    plain = OneActivationForTwoRuns().double()
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6, dtype=torch.double)
    values = {name: torch.rand_like(parameter) for name, parameter in plain.named_parameters()}
    call = torch.func.functional_call
    assert_close(call(fused, values, (x,)), call(plain, values, (x,)), FLOAT64, "functional_call")
    replica = fused._replicate_for_data_parallel()  # as nn.DataParallel makes them
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in fused.named_children()}
    for name, child in fused.named_children():
        replica._modules[name]._parameters = {key: p.detach() * 2 for key, p in child._parameters.items()}
    twice = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    assert_close(replica.eval()(x), twice.eval()(x), FLOAT64, "replica")


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(2, 4, 6, 6))])
def test_scripted_modules_stay_as_they_are(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = make(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 6, 6)
    for plain, name, runs in (
        (scripted, "", []),
        (nn.Sequential(scripted, nn.BatchNorm2d(4), nn.ReLU()), "0", [("1", "2")]),
    ):
        fused = fastgen.fuse(plain)
        report = fastgen.fusion_report(fused)
        assert [run.names for run in report.fused] == runs
        assert [(left.name, "TorchScript" in left.reason) for left in report.left] == [(name, True)]
        assert_close(fused(x), plain(x), LAYER, "output")


def test_output_size_of_a_fused_module():
    plain = Attributes()
    fused, x = fastgen.fuse(plain), torch.randn(2, 4, 6, 6)
    assert_close(fused.c2(x, output_size=[6, 6]), plain.b2(plain.c2(x)), LAYER, "the run")


def test_a_model_that_cannot_be_copied_is_fused_in_place():
    plain = nn.Sequential(Attributes(), nn.Conv2d(4, 4, 1), nn.Tanh())
    model = copy.deepcopy(plain)
    model[0].lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        fastgen.fuse(model)
    report = fastgen.fusion_report(fastgen.fuse(model, inplace=True))
    assert [run.names for run in report.fused] == [("1", "2")]
    assert any(left.name == "0" and "cannot be traced: TypeError" in left.reason for left in report.left)
    assert_same_calls(model, plain, torch.randn(2, 4, 6, 6), FLOAT32)


@pytest.mark.parametrize("call", [fastgen.fuse, fastgen.fusion_report])
def test_bad_model(call):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        call({})


class SharedBySequentials(nn.Module):
    """A convolution that is an attribute and a member of two Sequentials, so it has three names."""

    def __init__(self):
        super().__init__()
        self.act, self.first, self.second, self.norm = (
            nn.ReLU(),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )
        self.block = nn.Sequential(self.second, self.norm, self.act)
        self.block2 = nn.Sequential(self.second, self.act)

    def forward(self, x):
        return self.block2(self.block(self.act(self.norm(self.second(self.act(self.norm(self.first(x))))))))


def test_a_module_of_several_names_is_reported():
    model, x = SharedBySequentials().eval(), torch.randn(2, 3, 5, 5)
    fused = fastgen.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    report = fastgen.fusion_report(fused)
    assert {name for run in report.fused for name in run.names} <= {
        name for name, _ in model.named_modules(remove_duplicate=False)
    }
