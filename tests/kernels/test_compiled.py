"""Every configuration that auto can pick, compiled for GPUs that need not be present: nothing spills, everything fits.

The launches are those that the launchers make, recorded with tensors that have no data.
"""

import functools
import os

import pytest
import torch

from fastgen.ops import _tiers

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.compiled import TARGETS, compiled

kernels = _tiers.triton.kernels
_launch, _tiles = kernels("_launch"), kernels("_tiles")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = {"16 bits": (BF16, FP16), "tf32": (FP32,), "gathered": (BF16, FP32), "ieee": (FP32,)}


def meta(*shape, dtype=BF16, channels_last=True):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x


def vector(channels):
    return meta(channels, dtype=FP32)


def convolution(n, c, size, out, kernel, dtype, *, training=True, transposed=True, channels_last=True, bias=False,
                residual=False, activation="relu", groups=1, reflect=False, tile=""):  # fmt: skip
    """The launches of a layer with stride 2 (1 with reflection) and a measured tile."""
    x = meta(n, c, size, size, dtype=dtype, channels_last=channels_last)
    weight = (c, out // groups) if transposed else (out, c // groups)
    w = meta(*weight, kernel, kernel, dtype=dtype, channels_last=channels_last)
    stride = [1, 1] if reflect else [2, 2]
    size = 2 * size if transposed else size if reflect else size // 2
    norm = [vector(out), vector(out), *([None, None] if training else [vector(out), vector(out)])]
    added = meta(n, out, size, size, dtype=dtype, channels_last=channels_last) if residual else None
    arguments = [x, w, vector(out) if bias else None, *norm, added, "batch", 0, 1e-5, activation, 0.2, stride, [1, 1]]
    name, rest = ("conv_transpose2d_norm_act", [0, 0]) if transposed else ("conv2d_norm_act", reflect)
    with _launch.recorded() as launches:
        kernels(name).forward(*arguments, rest, groups, [1, 1], training, tile=tile)
    return launches


@functools.cache
def of_tile(precision, tile, dtype, **layer):
    """The launch of a layer whose measured choice is this tile."""
    layer = {"c": 256, "size": 8, "out": 128, "kernel": 4, "channels_last": precision != "gathered"} | layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiles, "precision_of", lambda x: "tf32" if precision == "gathered" else precision)
        patch.setattr(_tiles, "splits_of", lambda *_: 1)
        return convolution(64, dtype=dtype, tile=str(tile), **layer)[0]


def check(launch, capability):
    result = compiled(launch, capability)
    name = launch[0].__name__
    assert result.local == 0, f"{name} keeps {result.local} bytes of a thread in memory"
    assert result.shared <= TARGETS[capability], name
    return result


every_tile = pytest.mark.parametrize(
    ("precision", "tile"),
    [(precision, tile) for precision, tiles in _tiles.TILES.items() for tile in tiles],
    ids=str,
)


@pytest.mark.parametrize("capability", TARGETS)
@every_tile
def test_tiles(precision, tile, capability):
    """Each configuration of the convolutions, with partial statistics, uses the newest tensor core instruction."""
    for dtype in PRECISIONS[precision]:
        launch = of_tile(precision, tile, dtype)
        assert (launch[2]["ROWS"], launch[2]["COLUMNS"], launch[2]["DEPTH"]) == tile[:3]
        result = check(launch, capability)
        if precision == "ieee":
            assert not result.matrix_instructions and "fma.rn.f32" in result.ptx
            continue
        newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert result.matrix_instructions == {newest if tile.rows >= 64 else "mma.sync"}
        assert precision == "gathered" or "cp.async" in result.ptx  # the loads run ahead of the products


OTHER_LAYERS = {
    "eval": {"training": False, "bias": True, "activation": "silu"},
    "reflect": {"transposed": False, "reflect": True, "kernel": 3},
    "few-channels": {"transposed": False, "c": 3},
}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", OTHER_LAYERS)
@every_tile
def test_tiles_of_other_layers(precision, tile, name, capability):
    """A measured choice may give a layer any tile of its kind, except 128 columns if norm and activation are in the
    same kernel."""
    if name == "few-channels" and precision not in ("gathered", "ieee"):
        return  # they are gathered
    dtype = FP32 if precision == "gathered" else PRECISIONS[precision][0]
    launch = of_tile(precision, tile, dtype, **OTHER_LAYERS[name])
    if name == "eval" and tile.columns == 128:
        tile = _tiles.TILES[precision][1]
    assert (launch[2]["ROWS"], launch[2]["COLUMNS"], launch[2]["DEPTH"]) == tile[:3]
    check(launch, capability)


def weight_gradient(n, rows, size, channels, dtype, *, transposed=True, channels_last=True, groups=1, reflect=False,
                    tile=""):  # fmt: skip
    """The launches for the gradient of a weight (rows, channels / groups, 4, 4), stride 2, from images of this size and
    of twice this size."""
    inner = meta(n, rows, size, size, dtype=dtype, channels_last=channels_last)
    outer = meta(n, channels, 2 * size, 2 * size, dtype=dtype, channels_last=channels_last)
    weight = meta(rows, channels // groups, 4, 4, dtype=dtype, channels_last=channels_last)
    images = (outer, inner) if transposed else (inner, outer)
    geometry = ([2, 2], [1, 1], [0, 0] if transposed else [], groups, [1, 1], reflect)
    with _launch.recorded() as launches:
        kernels("convolution_weight_grad").weight_grad(*images, weight, *geometry, tile=tile)
    return launches


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("channels", (128, 3))
@every_tile
def test_tiles_of_weight_gradients(precision, tile, channels, capability, monkeypatch):
    """With reflection, which needs the most registers. Both operands are contiguous along channels, not along the sum:
    16-bit values are still copied 16 bytes at a time, and TF32 values are transposed on the way for the newest
    instruction."""
    if channels == 3 and precision not in ("gathered", "ieee"):
        return  # they are gathered
    monkeypatch.setattr(_tiles, "precision_of", lambda x: "tf32" if precision == "gathered" else precision)
    dtype = FP32 if precision == "gathered" else PRECISIONS[precision][0]
    layer = {"transposed": False, "reflect": True, "channels_last": precision != "gathered"}
    launch = weight_gradient(64, 256, 8, channels, dtype, **layer, tile=str(tile))[0]
    assert (launch[2]["ROWS"], launch[2]["COLUMNS"], launch[2]["DEPTH"]) == tile[:3]
    assert launch[2]["FLAT"] == (channels == 3)
    result = check(launch, capability)
    assert ("cp.async.cg" if precision == "16 bits" else "cp.async") in result.ptx
    if precision == "ieee":
        assert not result.matrix_instructions and "fma.rn.f32" in result.ptx
    else:
        newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert result.matrix_instructions == {newest if tile.rows >= 64 else "mma.sync"}


OTHER_WEIGHT_GRADIENTS = {
    "transposed": {"n": 512, "rows": 128},
    "contiguous": {"channels_last": False},
    "groups": {"groups": 2},
    "float16": {"dtype": FP16, "transposed": False},
    "one-part": {"n": 1, "size": 4},
    "wide": {"n": 2**17},
}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", OTHER_WEIGHT_GRADIENTS)
def test_other_weight_gradients(name, capability):
    layer = {"n": 64, "rows": 64, "size": 16, "channels": 64, "dtype": BF16} | OTHER_WEIGHT_GRADIENTS[name]
    launches = weight_gradient(**layer)
    assert [launch[0].__name__ for launch in launches] == ["correlate", *["add"] * (name != "one-part")]
    assert launches[0][2]["WIDE"] == (name == "wide")
    for launch in launches:
        result = check(launch, capability)
        assert result.matrix_instructions or launch[0].__name__ == "add"


OTHER_CONVOLUTIONS = {
    "eval": {"training": False, "bias": True, "activation": "silu", "c": 256, "out": 256, "n": 512},
    "contiguous": {"channels_last": False},
    "strided": {"transposed": False, "training": False, "c": 256, "n": 256},
    "reflect": {"transposed": False, "reflect": True},
    "few-channels": {"transposed": False, "c": 3},
    "groups": {"c": 128, "groups": 2},
    "split": {"n": 1, "c": 512, "size": 4, "training": False, "bias": True},
    "wide": {"n": 2**17},
    "wide-eval": {"n": 2**17, "training": False, "bias": True, "activation": "silu"},
    "wide-contiguous": {"n": 2**17, "channels_last": False},
}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", OTHER_CONVOLUTIONS)
def test_other_convolutions(name, capability):
    """All launches of one call, for other kinds of layers."""
    layer = {
        "n": 64,
        "c": 64,
        "size": 16,
        "out": 64,
        "kernel": 3 if name == "reflect" else 4,
        "dtype": BF16,
    } | OTHER_CONVOLUTIONS[name]
    launches = convolution(**layer)
    assert launches[0][2]["SPLIT"] == (name == "split") and launches[0][2]["FLAT"] == (name == "few-channels")
    assert launches[0][2]["WIDE"] == name.startswith("wide")
    for launch in launches:
        result = check(launch, capability)
        assert result.matrix_instructions or launch[0].__name__ != "convolve"


def norm_act_launches(dtype, channels_last, norm, activation):
    """Forward and backward, with a residual."""
    x = meta(64, 128, 32, 32, dtype=dtype, channels_last=channels_last)
    groups = 32 if norm == "group" else 0
    mean = vector(128) if norm == "batch" else meta(64, groups or 128, dtype=FP32)
    parameters, options = (vector(128), vector(128)), (norm, groups, 1e-5, activation, 0.2)
    with _launch.recorded() as launches:
        kernels("norm_act").forward(x, *parameters, None, None, x, *options)
        kernels("norm_act").backward(x, x, *parameters, mean, mean, x, True, *options)
        kernels("norm_act").forward(x, *parameters, *(vector(128),) * 2, x, *options)
    return launches


def sampler_launches(dtype, batch, length, samples, prior):
    mu = meta(batch, length, dtype=dtype)
    key, kl, z = meta(2, dtype=torch.int64), vector(batch), meta(samples, batch, length, dtype=dtype) if samples else mu
    prior_arguments, options = (mu, mu) if prior else (None, None), (-1.0, 1.0, 0.1, 0.5)
    with _launch.recorded() as launches:
        kernels("reparameterize").forward(mu, mu, key, *prior_arguments, samples, True, *options)
        kernels("reparameterize").backward(z, kl, mu, mu, key, *prior_arguments, samples, *options)
    return launches


def test_a_batch_of_any_size_is_launched():
    """A GPU takes at most 65535 programs along each dimension of a grid but the first, and vmap makes larger
    batches."""
    mu, key = meta(10**5, 2, 3, dtype=FP32), meta(10**5, 2, dtype=torch.int64)
    with _launch.recorded() as launches:
        kernels("reparameterize").forward(mu, mu, key, None, None, 0, True, None, None, 0.0, 1.0)
        kernels("reparameterize").backward(mu, None, mu, mu, key, None, None, 0, None, None, 0.0, 1.0)
    assert [len(grid) for _, grid, *_ in launches] == [1, 1]


def test_a_grid_that_no_gpu_takes():
    """CUDA's own error would not say what is too large: here a convolution's groups, which vmap multiplies."""
    with pytest.raises(ValueError, match=r"70000.*fewer images or groups.*impl='reference'"):
        convolution(1, 70_000, 4, 70_000, 4, FP32, transposed=False, groups=70_000)


def spectral_launches(dtype, count, v_first, iterations, divide=True, rows=96):
    weights = [meta(rows, 96, 3, 3, dtype=dtype, channels_last=False)] * count
    us, vs, scalars = [vector(rows)] * count, [vector(864)] * count, [meta(dtype=FP32)] * count
    with _launch.recorded() as launches:
        kernels("spectral_norm").forward(weights, us, vs, [0] * count, iterations, 1e-12, v_first, divide)
        kernels("spectral_norm").backward(weights, scalars, weights, scalars, us, vs, [0] * count)
    return launches


OTHERS = {
    "norm_act-batch-bf16": lambda: norm_act_launches(BF16, True, "batch", "silu"),
    "norm_act-batch-fp32-contiguous": lambda: norm_act_launches(FP32, False, "batch", "tanh"),
    "norm_act-instance-fp16": lambda: norm_act_launches(FP16, True, "instance", "relu"),
    "norm_act-group-fp32": lambda: norm_act_launches(FP32, True, "group", "silu"),
    "sampler": lambda: sampler_launches(BF16, 256, 128, 0, False),
    "sampler-odd": lambda: sampler_launches(FP32, 256, 101, 3, True),
    "sampler-wide": lambda: sampler_launches(BF16, 1, 2**31, 0, False),
    "spectral_norm": lambda: spectral_launches(FP32, 1, False, 1),
    "spectral_norm-group": lambda: spectral_launches(FP32, 13, False, 1),
    "spectral_norm-sigma": lambda: spectral_launches(FP32, 5, False, 1, divide=False),
    "spectral_norm-v_first": lambda: spectral_launches(BF16, 2, True, 1),
    "spectral_norm-wide": lambda: spectral_launches(FP32, 1, False, 1, rows=2**22),
    "spectral_norm-eval": lambda: spectral_launches(FP32, 2, False, 0),
}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, capability):
    launches = OTHERS[name]()
    assert launches
    for launch in launches:
        check(launch, capability)


def test_every_tile_can_be_picked():
    """Each tile is picked for some layer, and no others are picked."""
    picked = {
        (precision, _tiles.choose_tile(precision, rows, columns, products, 132))
        for precision in _tiles.TILES
        for rows in (1, 16, 100, 1024, 10**4, 10**6)
        for columns in (1, 3, 24, 48, 64, 128, 1024)
        for products in (1, 4)
    }
    assert picked == {(precision, tile) for precision, tiles in _tiles.TILES.items() for tile in tiles}


def test_a_measured_tile_is_picked_if_it_is_of_the_kind():
    for kind, tiles in _tiles.TILES.items():
        default = _tiles.choose_tile(kind, 10**6, 128, 1, 132)
        assert [_tiles.choose_tile(kind, 10**6, 128, 1, 132, str(tile)) for tile in tiles] == list(tiles)
        for other in ("", "7x7x7x1x1", "128x128x32x8x9"):
            assert _tiles.choose_tile(kind, 10**6, 128, 1, 132, other) == default
