"""Engine: published networks as plans, compared with themselves in float64."""

import copy
import logging
import math
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.errors import FastgenError, UsageError
from fastgen.inference._lower import lower
from fastgen.runtime import Plan
from fastgen.runtime._file import encode
from tests.inference.parity import FEW_LAYERS, NETWORK, assert_parity, prepared
from tests.support.networks import (
    NETWORKS,
    DCGANDiscriminator,
    DCGANGenerator,
    GBlock,
    PatchGAN,
    ResnetGenerator,
    SNGANGenerator,
    VanillaVAE,
    unet,
)


class Decoder(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z)


WHOLE = {
    "dcgan": (DCGANGenerator, (6, 1, 1)),
    "dcgan, wide": (lambda: DCGANGenerator(24, 16), (24, 1, 1)),
    "fastgen's dcgan": (lambda: fastgen.create_model("dcgan", image_size=32, ngf=8, nz=7).generator, (7,)),
    "dcgan discriminator": (DCGANDiscriminator, (3, 32, 32)),
    "cyclegan": (ResnetGenerator, (3, 16, 16)),
    "cyclegan, wide": (lambda: ResnetGenerator(16, 1), (3, 40, 24)),
    "patchgan, batch": (PatchGAN, (3, 32, 32)),
    "patchgan, instance": (lambda: PatchGAN(nn.InstanceNorm2d), (3, 32, 48)),
    "unet": (unet, (3, 32, 32)),
    "unet, dropout": (lambda: unet(dropout=True), (3, 32, 64)),
    "sngan": (SNGANGenerator, (5,)),
    "vae decoder": (lambda: Decoder(VanillaVAE()), (5,)),
    "vae encoder": (lambda: nn.Sequential(VanillaVAE().encoder, nn.Flatten(), nn.Linear(8 * 4, 3)), (3, 16, 16)),
}


MAX_ERROR = 1e-4  # test_compare.py shows that a wrong weight makes more


@pytest.mark.parametrize("name", WHOLE)
def test_networks_become_plans(name, tmp_path):
    make, shape = WHOLE[name]
    model = prepared(make)
    x = torch.rand(1, *shape) * 2 - 1
    engine = fastgen.Engine(model, x, impl="cpp")
    assert [part.runs for part in engine.parts] == ["plan"] and engine.error < MAX_ERROR
    engine.save(tmp_path / "a.fgplan")
    loaded = fastgen.Engine.load(tmp_path / "a.fgplan")
    for n in (1, 3, 17):
        x = torch.rand(n, *shape) * 2 - 1
        assert_parity(engine, model, x)
        assert torch.equal(loaded(x), engine(x))
        np.testing.assert_array_equal(Plan.load(tmp_path / "a.fgplan")(x.numpy()), engine(x).numpy())


@pytest.mark.parametrize("name", WHOLE)
def test_networks_in_bfloat16(name, tmp_path):
    make, shape = WHOLE[name]
    model = prepared(make)
    x = torch.rand(1, *shape) * 2 - 1
    engine = fastgen.Engine(model, x, precision="bf16", impl="cpp")
    engine.save(tmp_path / "a.fgplan")
    assert fastgen.Engine.load(tmp_path / "a.fgplan").precision == "bf16"
    x = torch.rand(9, *shape) * 2 - 1
    assert torch.equal(fastgen.Engine.load(tmp_path / "a.fgplan")(x), engine(x))
    assert_parity(engine, model, x, "bf16")


WITHOUT_BFLOAT16 = """
import logging, sys
import torch
from torch import nn
import fastgen

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("fastgen").addHandler(handler)
x, note = torch.randn(2, 3, 8, 8), "as fp32: this processor does not multiply bfloat16"
conv = nn.Conv2d(3, 8, 3)
for model in (nn.Sequential(conv, nn.Tanh()), nn.Sequential(conv, nn.GELU())):
    engines = [fastgen.Engine(model.eval(), x, precision=precision) for precision in ("fp32", "bf16")]
    if engines[1].plan is not None:
        engines[1].save(sys.argv[1])
        messages.append("loaded")
        engines.append(fastgen.Engine.load(sys.argv[1]))
    for engine in engines[1:]:
        assert engine.precision == "bf16" and note in repr(engine)
        assert [part.reason for part in engine.parts if part.runs == "plan"] == [note]
        assert torch.equal(engine(x), engines[0](x))
    assert note not in repr(engines[0])
warning = "Engine: precision 'bf16' runs " + note
notes = [message for message in messages if note in message or message == "loaded"]
assert notes == [warning, "loaded", warning, warning], notes
"""


def test_bf16_on_a_processor_without_it_says_that_it_runs_as_fp32(tmp_path):
    # Only the direct algorithm can run, so that engines that are tuned one by one compute the same bits.
    environment = {**os.environ, "FASTGEN_CPU_ISA": "avx2", "FASTGEN_WINOGRAD": "0"}
    code = [sys.executable, "-c", WITHOUT_BFLOAT16, tmp_path / "a.fgplan"]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_bf16_on_a_processor_with_it_says_nothing(caplog):
    with caplog.at_level(logging.WARNING, "fastgen"):
        engine = fastgen.Engine(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8), precision="bf16", impl="cpp")
    if engine.plan.runs_as == "fp32":
        pytest.skip("this processor does not multiply bfloat16")
    assert engine.parts == (fastgen.inference.Part("", "plan"),) and not caplog.records


def test_modules_around_a_convolution():
    """Modules that become part of a convolution's step, or a step of their own, or no part of the plan."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 2, dilation=2, groups=2)
            self.bn = nn.BatchNorm2d(8)
            self.up = nn.ConvTranspose2d(16, 6, 3, 2, 1, output_padding=1, groups=2, bias=False)
            self.gn = nn.GroupNorm(3, 6)
            self.sn = nn.utils.parametrizations.spectral_norm(
                nn.Conv2d(6, 3, (1, 3), padding=(0, 1), padding_mode="reflect")
            )

        def forward(self, x):
            h = F.silu(self.bn(self.a(x)))  # read twice
            down = self.b(F.relu(h, inplace=True)) * 0.5 + 1  # the result of relu is read twice too
            joined = torch.cat([down, F.leaky_relu(self.b(h), 0.3)], 1)
            y = torch.sigmoid(self.gn(self.up(joined)))
            z = self.sn(y) + x
            return torch.tanh(z + self.sn(torch.tanh(y)))

    model = prepared(Odd)
    assert_parity(fastgen.Engine(model, torch.rand(1, 3, 12, 10), impl="cpp"), model, torch.rand(5, 3, 12, 10))


def test_algorithms_agree_on_wide_layers():
    """Layers that Winograd's and the row-wise algorithm compute."""
    model = prepared(
        lambda: nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 48, 4, 2, 1), nn.InstanceNorm2d(48), nn.ReLU(), nn.Conv2d(48, 3, 7, padding=3),
            nn.Tanh(),
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 0.2
    engine = fastgen.Engine(model, torch.randn(1, 16, 32, 40), impl="cpp")
    for n in (1, 9):
        assert_parity(engine, model, torch.randn(n, 16, 32, 40))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_runs_in_plans_or_not(name, caplog):
    make, shape, _ = NETWORKS[name]
    model, x = prepared(make), torch.rand(shape) * 2 - 1
    with caplog.at_level(logging.WARNING, "fastgen"):
        engine = fastgen.Engine(model, x)
    assert ("not all of" in caplog.text) == any(part.runs != "plan" for part in engine.parts) or engine.plan is None
    if name != "vae":  # draws noise
        assert_parity(engine, model, x)
    else:
        assert len(engine(x)) == 3


def test_a_loaded_engine_is_the_one_that_was_saved(tmp_path):
    engine = fastgen.Engine(prepared(lambda: ResnetGenerator(4, 1)), torch.rand(1, 3, 16, 16), impl="cpp")
    engine.save(tmp_path / "a.fgplan")
    loaded = fastgen.Engine.load(tmp_path / "a.fgplan")
    assert loaded.error == engine.error > 0 and vars(loaded).keys() == vars(engine).keys()
    for other in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert repr(other) == repr(engine) and (other.parts, other.precision) == (engine.parts, engine.precision)
        with pytest.raises(ValueError, match=r"\(N, 3, 16, 16\), got \(1, 3, 16, 20\)"):
            other(torch.rand(1, 3, 16, 20))
        other.save(tmp_path / "b.fgplan")
        assert (tmp_path / "b.fgplan").read_bytes() == (tmp_path / "a.fgplan").read_bytes()


def test_an_error_that_was_not_measured_is_not_claimed(tmp_path):
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.rand(2, 3, 8, 8)
    (tmp_path / "a.fgplan").write_bytes(encode(lower(model, x)))
    engine = fastgen.Engine.load(tmp_path / "a.fgplan")
    assert math.isnan(engine.error) and "error=not measured" in repr(engine)
    assert_parity(engine, model, x)


def test_unknown_parts_run_through_pytorch_and_are_named(tmp_path):
    model = prepared(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bicubic"),
            nn.Conv2d(8, 3, 3),
            nn.Tanh(),
        )
    )
    engine = fastgen.Engine(model, torch.rand(2, 3, 8, 8))
    assert [(part.name, part.runs) for part in engine.parts] == [
        ("0 to 1", "plan"),
        ("2", "PyTorch"),
        ("3 to 4", "plan"),
    ]
    assert "interpolate" in engine.parts[1].reason
    assert_parity(engine, model, torch.rand(5, 3, 8, 8))
    with pytest.raises(FastgenError, match="interpolate"):
        engine.save(tmp_path / "no.fgplan")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FastgenError, match="interpolate"):
        fastgen.Engine(model, torch.rand(2, 3, 8, 8), impl="cpp")

    class Gelu(GBlock):
        def _shortcut(self, x):
            return F.gelu(super()._shortcut(x))

    whole = fastgen.Engine(Gelu(4, 4).eval(), torch.rand(1, 4, 8, 8))
    assert whole.parts[0] == fastgen.inference.Part("", "PyTorch", "gelu") and whole.plan is None
    assert {part.name for part in whole.parts if part.runs == "plan"} == {"c1", "c2", "c_sc"}


def test_the_model_stays_as_it_is_and_the_engine_keeps_its_weights():
    model = prepared(DCGANGenerator).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    z = torch.randn(2, 6, 1, 1)
    for source in (model, fastgen.fuse(model)):
        engine = fastgen.Engine(source, z)
        assert source.training and all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
        expected = model.eval()(z)
        first = engine(z)
        torch.testing.assert_close(first, expected, **NETWORK)
        model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(engine(z), first)


def test_several_threads_call_one_engine():
    engine = fastgen.Engine(prepared(ResnetGenerator), torch.rand(1, 3, 16, 16), impl="cpp")
    inputs = [torch.rand(n, 3, 16, 16) for n in (1, 2, 5, 1)]
    expected = [engine(x) for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(20) if not torch.equal(engine(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_layouts_and_wrong_inputs():
    model = prepared(lambda: ResnetGenerator(4, 1))
    engine = fastgen.Engine(model, torch.rand(1, 3, 16, 16), impl="cpp")
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(engine(x.to(memory_format=torch.channels_last)), engine(x))
    assert torch.equal(engine(x[:1].expand(2, -1, -1, -1)), engine(x[:1].repeat(2, 1, 1, 1)))
    assert engine(x[:0]).shape == (0, 3, 16, 16)
    for wrong, error, words in (
        (torch.rand(1, 3, 16, 20), ValueError, r"\(N, 3, 16, 16\), got \(1, 3, 16, 20\)"),
        (x.double(), TypeError, "float32 tensor on the CPU, got torch.float64"),
        (x.numpy(), TypeError, "got ndarray"),
    ):
        with pytest.raises(error, match=words):
            engine(wrong)


def test_non_finite_values_propagate_as_in_pytorch():
    model = prepared(DCGANGenerator)
    engine = fastgen.Engine(model, torch.randn(1, 6, 1, 1), impl="cpp")
    z = torch.randn(4, 6, 1, 1)
    z[1, 2], z[2, 0] = float("nan"), float("inf")
    assert torch.equal(engine(z).isnan(), model(z).isnan())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "dcgan"}, TypeError, "torch.nn.Module, got str"),
        ({"example_inputs": (torch.rand(1, 3), 7)}, TypeError, r"a tuple of tensors, got \['Tensor', 'int'\]"),
        ({"example_inputs": ()}, TypeError, "a tuple of tensors, got"),
        ({"example_inputs": torch.rand(3)}, UsageError, r"at least one image, got shape \(3,\)"),
        (
            {"example_inputs": torch.rand(1, 3, 4, 4, device="meta")},
            UsageError,
            "got meta and a model on cpu: move one",
        ),
        ({"model": nn.LazyLinear(3)}, UsageError, "uninitialized lazy modules"),
        ({"example_inputs": torch.nested.nested_tensor([torch.rand(3)])}, TypeError, "got a nested tensor"),
        ({"precision": "fp8"}, UsageError, "fp32, tf32, bf16, fp16, got 'fp8'"),
        ({"precision": "fp16"}, UsageError, "no kernels on a CPU"),
        ({"impl": "cuda"}, UsageError, "'auto', 'cpp', 'reference' on a CPU, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    options = {"model": nn.Linear(3, 3), "example_inputs": torch.rand(1, 3), **arguments}
    with pytest.raises(error, match=words):
        fastgen.Engine(options.pop("model"), options.pop("example_inputs"), **options)


def test_a_model_whose_shape_depends_on_the_batch_is_not_a_plan():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + torch.full((1,), float(len(x)))

    with pytest.raises(FastgenError):
        fastgen.Engine(Fixed().eval(), torch.rand(2, 4), impl="cpp")
    engine = fastgen.Engine(Fixed().eval(), torch.rand(2, 4))
    torch.testing.assert_close(engine(torch.zeros(5, 4)), (engine(torch.zeros(1, 4)) + 4).expand(5, 4), **FEW_LAYERS)
