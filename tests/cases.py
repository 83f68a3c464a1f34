"""The case table: one row drives an op's parity, gradients, opcheck, torch.compile and benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgen import ops
from fastgen._build.native import CUDA_ON_CPU, INTERPRETED
from fastgen.ops._processor import Processor
from tests.support.tolerance import UNIT_ROUNDOFF

# The implementation that the tests compare with the reference: triton with TRITON_INTERPRET=1, as tests/kernels sets
# it.
TESTED = "triton" if INTERPRETED else "cuda" if CUDA_ON_CPU else "cpp"


@dataclass(frozen=True, eq=False)
class OpCase:
    """A call of a public op: the shapes of its tensors by argument name, and its options."""

    op: str
    name: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    bench: bool = False  # a real layer's shape: benchmarked, and too large for gradcheck
    dtypes: tuple[torch.dtype, ...] = tuple(UNIT_ROUNDOFF)
    factor: float = 2.0  # the error may be this many times that of PyTorch's own ops in the same precision,
    floor: float = 4.0  # or this many units of roundoff if PyTorch's error happens to be smaller,
    sum_floor: float = 16.0  # or this many in a parameter's gradient, a sum whose terms may cancel,
    float64_floor: float = (
        16.0  # times the floor, as there is no wider oracle: the reference's error is in the difference,
    )
    winograd: float = 5e-6  # or this much where Winograd's algorithm runs (csrc/cpu/convolution.h says where)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def batch_stats(self) -> bool:
        """Whether the norm takes its statistics from the input."""
        norm = self.options.get("norm", "none")
        return norm != "none" and (self.options.get("training", False) or "running_mean" not in self.shapes)

    def tensors(self, dtype: torch.dtype, channels_last: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of this precision. Statistics and the norm's gain are positive; nothing is degenerate."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in ("running_var", "norm_weight"):
                value = value.abs() + 0.5
            if name == "weight":
                fan_in = value[:, 0].numel() if "transpose" in self.op else value[0].numel()
                value /= math.sqrt(max(1, fan_in) / math.prod(self._steps()))
            if channels_last and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            made[name] = value.to(dtype)
        return made

    def allowed(self, reference_error: float, dtype: torch.dtype, name: str, winograd: bool = False) -> float:
        """The largest relative L2 error of an output or gradient, given that of PyTorch's own ops."""
        floor = self.sum_floor if name.startswith("grad") and name != "grad of x" else self.floor
        if dtype == torch.float64:
            floor *= self.float64_floor
        return max(self.factor * reference_error, floor * UNIT_ROUNDOFF[dtype], self.winograd if winograd else 0)

    def call(self, tensors: dict[str, Tensor], **options: Any) -> Tensor:
        first = [tensors[name] for name in tensors if name == "x"]  # by position: its name is the op's own
        rest = {name: tensor for name, tensor in tensors.items() if name != "x"}
        return getattr(ops, self.op)(*first, **rest, **self.options | options)

    def _steps(self) -> tuple[int, int]:
        stride = self.options.get("stride", 1)
        return (1, 1) if "transpose" not in self.op else (stride, stride) if isinstance(stride, int) else stride

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes moved by a forward pass that reads each input and writes the output once."""
        sizes = [math.prod(shape) for shape in (*self.shapes.values(), self._output_shape())]
        return sum(sizes) * dtype.itemsize

    def _output_shape(self) -> tuple[int, ...]:
        meta = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return tuple(self.call(meta, impl="reference").shape)

    def flops(self) -> int:
        """Multiplications and additions of the direct convolution; 0 for ops without a convolution."""
        if "weight" not in self.shapes:
            return 0
        if "transpose" in self.op:
            n, channels, height, width = self.shapes["x"]
            return 2 * n * height * width * channels * math.prod(self.shapes["weight"][1:])
        n, channels, height, width = self._output_shape()
        return 2 * n * height * width * channels * math.prod(self.shapes["weight"][1:])


LAYER = {"norm": "batch", "activation": "leaky_relu"}  # unless a row says otherwise


def _norm_act(
    name: str, shape: tuple[int, ...], *, affine: bool = True, running: bool = True, **options: Any
) -> OpCase:
    return OpCase("norm_act", name, {"x": shape} | _channels(shape[1], affine, running), LAYER | options)


def _channels(channels: int, affine: bool, running: bool) -> dict[str, tuple[int, ...]]:
    names = ["norm_weight", "norm_bias"] * affine + ["running_mean", "running_var"] * running
    return dict.fromkeys(names, (channels,))


def _conv(
    name: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    op: str = "conv_transpose2d_norm_act",
    bias: bool = False,
    affine: bool = True,
    running: bool = True,
    residual: tuple[int, ...] | None = None,
    bench: bool = False,
    **options: Any,
) -> OpCase:
    channels = weight[1] * options.get("groups", 1) if "transpose" in op else weight[0]
    shapes = {"x": x, "weight": weight} | ({"bias": (channels,)} if bias else {})
    if options.get("norm", "batch") != "none":
        shapes |= _channels(channels, affine, running)
    if residual:
        shapes["residual"] = residual
    return OpCase(op, name, shapes, LAYER | options, bench)


def _conv2d(name: str, x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> OpCase:
    return _conv(name, x, weight, op="conv2d_norm_act", **options)


_DCGAN = {"training": True, "activation": "relu", "stride": 2, "padding": 1, "bench": True}
_DCGAN_D = _DCGAN | {"activation": "leaky_relu", "negative_slope": 0.2, "inplace": True}
_CYCLEGAN = {"bias": True, "norm": "instance", "affine": False, "running": False, "activation": "relu", "bench": True}
_VAE = {"bias": True, "training": True, "stride": 2, "padding": 1, "bench": True}
CASES = [
    _norm_act("batch", (3, 5, 7, 6), training=True),
    _norm_act("batch-eval", (2, 17, 3, 5), activation="tanh"),
    _norm_act("batch-2d", (33, 5), training=True, activation="silu"),
    _norm_act("batch-3d", (4, 3, 9), training=True, activation="relu"),
    _norm_act("batch-5d", (2, 3, 2, 3, 4), training=True, activation="sigmoid"),
    _norm_act("batch-plain", (2, 3, 4, 5), affine=False, running=False, training=True, activation="identity"),
    _norm_act("instance", (3, 4, 5, 6), norm="instance", running=False, activation="relu"),
    _norm_act("instance-running", (2, 3, 4, 4), norm="instance", training=True, activation="leaky_relu",
          negative_slope=0.2),
    _norm_act("instance-eval", (2, 3, 4, 4), norm="instance", activation="sigmoid"),
    _norm_act("none", (2, 3, 5, 5), affine=False, running=False, norm="none", activation="tanh"),
    OpCase("norm_act", "group", {"x": (3, 6, 4, 5), "norm_weight": (6,), "norm_bias": (6,)},
          LAYER | {"norm": "group", "num_groups": 2, "activation": "silu"}),
    OpCase("norm_act", "residual",
          {"x": (3, 4, 5, 3), "residual": (3, 4, 5, 3), "norm_weight": (4,), "norm_bias": (4,)},
          LAYER | {"training": True, "activation": "relu"}),
    OpCase("norm_act", "residual-none", {"x": (2, 4, 5, 3), "residual": (2, 4, 5, 3)},
          {"norm": "none", "activation": "tanh"}),
    _norm_act("one-channel", (5, 1, 3, 3), training=True, eps=1e-3),
    OpCase("norm_act", "inplace-residual", {"x": (2, 4, 5, 3), "residual": (2, 4, 5, 3)},
          {"norm": "none", "activation": "leaky_relu", "negative_slope": 0.2, "inplace": True}),
    OpCase("norm_act", "relu-residual", {"x": (2, 4, 5, 3), "residual": (2, 4, 5, 3)},
          {"norm": "none", "activation": "relu"}),
    _conv("dcgan-first", (5, 12, 1, 1), (12, 8, 4, 4), training=True, activation="relu"),
    _conv("dcgan-middle", (3, 6, 4, 4), (6, 9, 4, 4), training=True, activation="relu", stride=2, padding=1),
    _conv("dcgan-last", (2, 5, 6, 6), (5, 3, 4, 4), norm="none", activation="tanh", stride=2, padding=1),
    _conv("eval", (2, 4, 5, 3), (4, 35, 4, 4), bias=True, stride=2, padding=1, negative_slope=0.2),
    _conv("vae", (2, 6, 3, 3), (6, 4, 3, 3), bias=True, training=True, stride=2, padding=1, output_padding=1),
    _conv("instance", (2, 4, 5, 4), (4, 6, 3, 3), bias=True, norm="instance", affine=False, running=False, stride=2,
          padding=1, output_padding=1, activation="relu"),
    _conv("instance-running", (2, 4, 5, 4), (4, 3, 3, 3), norm="instance", training=True, activation="silu"),
    # Here PyTorch's own error in the gain's gradient is 8 units for one memory order and 25 for the other.
    replace(_conv("groups", (2, 6, 4, 5), (6, 2, 3, 2), bias=True, training=True, groups=3, stride=(2, 1),
          padding=(1, 0), activation="sigmoid"), sum_floor=32.0),
    _conv("dilation", (2, 3, 5, 4), (3, 4, 2, 3), training=True, stride=2, padding=2, dilation=(2, 3),
          output_padding=(1, 2), activation="identity"),
    _conv("gaps", (2, 3, 3, 3), (3, 4, 2, 1), bias=True, training=True, stride=3, output_padding=2, activation="silu"),
    _conv("unpadded", (2, 3, 6, 9), (3, 5, 3, 3), norm="none", stride=2, negative_slope=0.2),
    _conv("linear", (2, 3, 3, 4), (3, 5, 3, 3), bias=True, norm="none", activation="identity"),
    _conv("wide-rows", (1, 3, 40, 21), (3, 2, 4, 4), training=True, stride=2, padding=1),
    _conv("group-residual", (2, 4, 3, 3), (4, 6, 4, 4), residual=(2, 6, 6, 6), running=False, norm="group",
          num_groups=3, stride=2, padding=1, activation="silu"),
    _conv2d("patchgan-first", (2, 3, 8, 7), (5, 3, 4, 4), bias=True, norm="none", stride=2, padding=1,
          negative_slope=0.2),
    _conv2d("inplace", (2, 3, 8, 7), (5, 3, 4, 4), bias=True, norm="none", stride=2, negative_slope=0.2, inplace=True),
    _conv2d("patchgan-middle", (2, 4, 8, 8), (20, 4, 4, 4), training=True, stride=2, padding=1, negative_slope=0.2),
    _conv2d("many-channels", (2, 18, 7, 6), (5, 18, 3, 3), bias=True, training=True, stride=2, padding=1,
          activation="relu"),
    _conv2d("mirrored", (2, 3, 9, 12), (5, 3, 3, 3), norm="none", stride=2, padding=1, padding_mode="reflect",
          activation="relu"),
    _conv2d("eval", (2, 4, 5, 6), (3, 4, 3, 3), bias=True, padding=1, activation="relu"),
    _conv2d("cyclegan-first", (1, 3, 9, 8), (4, 3, 7, 7), bias=True, norm="instance", affine=False, running=False,
          padding=3, padding_mode="reflect", activation="relu"),
    _conv2d("cyclegan-block", (2, 4, 5, 6), (4, 4, 3, 3), bias=True, norm="instance", affine=False, running=False,
          padding=1, padding_mode="reflect", activation="identity", residual=(2, 4, 5, 6)),
    _conv2d("unclip-block", (2, 3, 6, 5), (8, 3, 3, 3), bias=True, norm="group", num_groups=4, running=False,
          padding=1, activation="silu"),
    _conv2d("groups", (2, 6, 7, 5), (4, 3, 3, 2), bias=True, training=True, groups=2, stride=(2, 1), padding=(0, 1),
          dilation=(2, 3), activation="sigmoid"),
    _conv2d("plain-residual", (2, 3, 6, 6), (4, 3, 1, 1), norm="none", activation="relu", residual=(2, 4, 6, 6)),
    _conv2d("linear-residual", (2, 3, 6, 6), (4, 3, 1, 1), norm="none", activation="identity", residual=(2, 4, 6, 6)),
    _conv("dcgan64-g0", (64, 100, 1, 1), (100, 512, 4, 4), training=True, activation="relu", bench=True),
    _conv("dcgan64-g1", (64, 512, 4, 4), (512, 256, 4, 4), **_DCGAN),
    _conv("dcgan64-g2", (64, 256, 8, 8), (256, 128, 4, 4), **_DCGAN),
    _conv("dcgan64-g3", (64, 128, 16, 16), (128, 64, 4, 4), **_DCGAN),
    _conv("dcgan64-g4", (64, 64, 32, 32), (64, 3, 4, 4), norm="none", activation="tanh", stride=2, padding=1,
          bench=True),
    _conv2d("dcgan64-d0", (64, 3, 64, 64), (64, 3, 4, 4), **_DCGAN_D | {"norm": "none"}),
    _conv2d("dcgan64-d1", (64, 64, 32, 32), (128, 64, 4, 4), **_DCGAN_D),
    _conv2d("dcgan64-d2", (64, 128, 16, 16), (256, 128, 4, 4), **_DCGAN_D),
    _conv2d("dcgan64-d3", (64, 256, 8, 8), (512, 256, 4, 4), **_DCGAN_D),
    _conv2d("cyclegan-first", (1, 3, 128, 128), (64, 3, 7, 7), padding=3, padding_mode="reflect", **_CYCLEGAN),
    _conv2d("cyclegan-down", (1, 64, 128, 128), (128, 64, 3, 3), stride=2, padding=1, **_CYCLEGAN),
    _conv2d("cyclegan-block", (1, 256, 32, 32), (256, 256, 3, 3), padding=1, padding_mode="reflect", **_CYCLEGAN),
    _conv("cyclegan-up", (1, 256, 32, 32), (256, 128, 3, 3), stride=2, padding=1, output_padding=1, **_CYCLEGAN),
    _conv2d("cyclegan-last", (1, 64, 128, 128), (3, 64, 7, 7), padding=3, padding_mode="reflect",
          **_CYCLEGAN | {"norm": "none", "activation": "tanh"}),
    _conv2d("vae64-encoder", (64, 32, 32, 32), (64, 32, 3, 3), **_VAE),
    _conv("vae64-decoder", (64, 64, 16, 16), (64, 32, 3, 3), output_padding=1, **_VAE),
    _conv2d("vae64-last", (64, 32, 64, 64), (3, 32, 3, 3),
          **_VAE | {"norm": "none", "activation": "tanh", "stride": 1}),
]  # fmt: skip
SAMPLER = [
    OpCase("reparameterize_kl", name, dict.fromkeys(("mu", "logvar", *prior), shape), options,
           sum_floor=4.0, float64_floor=4.0)  # no gradient is a long sum
    for name, shape, prior, options in (
        ("vae", (5, 20), (), {}),
        ("odd", (3, 7, 3), (), {"beta": 0.5}),
        ("vector", (9,), (), {}),
        ("image", (2, 4, 3, 5), (), {"logvar_range": (-1.0, 0.5)}),
        ("samples", (3, 6), (), {"num_samples": 4, "free_bits": 0.2}),
        ("prior", (4, 2, 5), ("prior_mean", "prior_logvar"), {"num_samples": 2}),
        ("long-rows", (2, 9001), (), {"free_bits": 0.1}),
    )
]  # fmt: skip
SAMPLER_LARGE = [OpCase("reparameterize_kl", "2M", {"mu": (16384, 128), "logvar": (16384, 128)}, bench=True)]
SPECTRAL = [
    OpCase("spectral_norm", name, {"weight": shape, "u": (shape[dim],), "v": (math.prod(shape) // shape[dim],)},
           # a sum of 70,000 in float64, by AVX2 in one thread, is 36 units of roundoff off (AVX-512: 1; PyTorch: 6)
           {"dim": dim} | options, floor=8.0 if name == "wide" else 4.0)
    for name, shape, dim, options in (
        ("linear", (7, 5), 0, {}),
        ("linear-dim1", (6, 5), 1, {"n_power_iterations": 2}),
        ("conv", (6, 5, 3, 3), 0, {"n_power_iterations": 3}),
        ("conv-eval", (6, 5, 4, 4), 0, {"training": False}),
        ("conv-old", (10, 3, 2, 2), 0, {"v_first": True}),
        ("transposed", (6, 5, 4, 4), 1, {}),
        ("transposed-old", (3, 7, 3, 3), 1, {"v_first": True}),
        ("transposed-eval", (4, 3, 3, 2, 2), 1, {"training": False}),
        ("middle", (3, 5, 4), 2, {}),
        ("tall", (700, 2), 0, {}),
        ("wide", (2, 70000), 0, {}),
        ("one", (1, 1), 0, {}),
        ("parts", (130, 300, 3, 3), 0, {}),
        ("parts-transposed", (130, 60, 3, 3), 1, {}),
    )
]  # fmt: skip
SPECTRAL_LARGE = [
    OpCase("spectral_norm", "512x256x4x4", {"weight": (512, 256, 4, 4), "u": (512,), "v": (4096,)}, bench=True)
]
_CH = 96  # BigGAN-128's discriminator: two 3x3 convolutions per block
BIGGAN_128 = [
    (out, channels, 3, 3)
    for block_in, out in (
        (3, _CH),
        (_CH, 2 * _CH),
        (2 * _CH, 4 * _CH),
        (4 * _CH, 8 * _CH),
        (8 * _CH, 16 * _CH),
        (16 * _CH,) * 2,
    )
    for channels in (block_in, out)
]
SMALL = [case for case in CASES if not case.bench]
LARGE = [case for case in CASES if case.bench]
# Benchmarked only on a GPU: layers of DCGAN-128 that DCGAN-64 does not have, and one as large as BigGAN's.
ON_GPU = [
    _conv("dcgan128-g1", (64, 1024, 4, 4), (1024, 512, 4, 4), **_DCGAN),
    _conv("dcgan128-last", (64, 64, 64, 64), (64, 3, 4, 4), norm="none", activation="tanh", stride=2, padding=1,
    bench=True),
    _conv("biggan-like-up", (64, 768, 16, 16), (768, 384, 4, 4), **_DCGAN),
]  # fmt: skip
# Classes of processors by name; their rules are tested on any machine.
PROCESSORS = {
    "avx2": Processor(),
    "avx512": Processor("AVX512", torch_bf16=True),
    "avx512_bf16": Processor("AVX512", torch_bf16=True, fastgen_bf16=True),
    "amx": Processor("AVX512", torch_bf16=True, torch_fp16=True, fastgen_bf16=True, fastgen_amx=True),
    "neon": Processor("DEFAULT"),
}
