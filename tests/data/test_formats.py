"""The meaning of the numbers in a picture: black is black and white is white, or the picture is refused by name."""

import numpy as np
import pytest
from PIL import Image

from fastgen.data import is_grey, load_dataset
from fastgen.data.decode import UnusableImageError, read_image

RAMP = np.arange(16).reshape(4, 4) / 15
GREY = np.arange(0, 256, 17)


def pillow(levels, **options):
    def save(path):
        Image.fromarray(levels).save(path, **options)

    return save


def tiff(levels, **tags):
    """A TIFF written by hand, for tags that Pillow does not write: one strip of `levels` with this photometric
    interpretation, bits and sample format."""

    def save(path):
        data = levels.astype(levels.dtype.newbyteorder("<")).tobytes()
        height, width = len(levels), tags.get("width", levels.shape[1])
        bits = tags.get("bits", 8 * levels.itemsize)
        fields = {
            256: width,
            257: height,
            258: bits,
            259: 1,
            262: tags.get("photometric", 1),
            273: 8,
            277: 1,
            278: height,
        }
        fields |= {279: len(data), 339: tags.get("sample_format", 1)}
        entries = b"".join(
            np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in fields.items()
        )
        count = np.array([len(fields)], "<u2").tobytes()
        path.write_bytes(b"II*\0" + np.array([8 + len(data)], "<u4").tobytes() + data + count + entries + bytes(4))

    return save


def raw(header, levels):
    return lambda path: path.write_bytes(header + levels.tobytes())


LEVELS = (RAMP * 65535).round().astype(np.uint16)
READ = {  # each holds the same ramp
    "8 bits.png": pillow(GREY.astype(np.uint8).reshape(4, 4)),
    "16 bits.png": pillow(LEVELS),
    "16 bits.tif": pillow(LEVELS),
    "16 bits, big-endian.tif": pillow(LEVELS.astype(">u2")),
    "16 bits, white is zero.tif": tiff(65535 - LEVELS, photometric=0),
    "float.tif": pillow(RAMP.astype(np.float32)),
    "float, white is zero.tif": tiff(1 - RAMP.astype(np.float32), photometric=0, sample_format=3),
    "float.pgm": raw(b"Pf\n4 4\n-1.0\n", RAMP[::-1].astype("<f4")),
    "16 bits.pgm": raw(b"P5\n4 4\n65535\n", LEVELS.astype(">u2")),
    "10 bits.pgm": raw(b"P5\n4 4\n1023\n", (RAMP * 1023).round().astype(">u2")),
    "4 bits.pgm": raw(b"P5\n4 4\n15\n", (RAMP * 15).astype("u1")),
    "12 bits.tif": tiff(
        np.frombuffer(b"".join(
            bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in (RAMP * 4095).round().astype(int).reshape(8, 2)
        ), "u1").reshape(4, 6), bits=12, width=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_black_is_black_and_white_is_white(name, tmp_path):
    READ[name](tmp_path / name)
    assert np.abs(read_image(tmp_path / name, 1).ravel() - GREY.astype(int)).max() <= 1
    assert is_grey(tmp_path / name)


REFUSED = {
    "float to 255.tif": (
        pillow((255 * RAMP).astype(np.float32)),
        "values run from 0 to 255, but black is 0 and white is 1",
    ),
    "float below 0.tif": (pillow((2 * RAMP - 1).astype(np.float32)), "values run from -1 to 1"),
    "NaN.tif": (pillow(np.full((4, 4), np.nan, np.float32)), "values run from nan to nan"),
    "32 bits.tif": (pillow(LEVELS.astype(np.int32)), "signed values of 32 bits"),
    "32 bits, unsigned.tif": (tiff(LEVELS.astype(np.uint32)), "unsigned values of 32 bits"),
    "16 bits, signed.tif": (tiff(LEVELS.astype(np.int16), sample_format=2), "it has signed values"),
    "8 bits, signed.tif": (tiff(np.zeros((4, 4), np.int8), sample_format=2), "it has signed values"),
    "lab.tif": (lambda path: Image.new("LAB", (4, 4)).save(path), "its colours are CIELAB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_levels_are_refused(name, tmp_path):
    save, message = REFUSED[name]
    save(tmp_path / name)
    with pytest.raises(UnusableImageError, match=message) as raised:
        read_image(tmp_path / name, 1)
    assert name in str(raised.value)


def test_transparency_is_white(tmp_path):
    grey = Image.fromarray(GREY.astype(np.uint8).reshape(4, 4))
    for name, image, transparency in (
        ("8 bits", grey, 34), ("16 bits", Image.fromarray(LEVELS), 34 * 257), ("palette", grey.quantize(16), None),
        ("palette in part", grey.quantize(16), None),
    ):  # fmt: skip
        index = image.getpixel((2, 0)) if transparency is None else transparency
        stored = bytes(255 * (at != index) for at in range(16)) if name.endswith("part") else index
        image.save(tmp_path / "a.png", transparency=stored)
        assert read_image(tmp_path / "a.png", 1).ravel().tolist() == [255 if at == 34 else at for at in GREY], name


def test_colours_and_kinds_without_a_level(tmp_path):
    for mode in ("RGB", "CMYK"):
        Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode).save(tmp_path / "a.tif")
        assert read_image(tmp_path / "a.tif", 3)[:, 0, 0].tolist() == [255, 0, 0] and not is_grey(tmp_path / "a.tif")
    Image.new("1", (4, 4), 1).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png", 1) == 255).all() and is_grey(tmp_path / "b.png")


@pytest.mark.parametrize("ending", ["gif", "tif", "png", "webp"])
def test_only_the_first_of_several_frames_is_read_and_this_is_said(ending, tmp_path, caplog):
    path = tmp_path / f"a.{ending}"
    frames = [Image.new("L", (4, 4), level) for level in (255, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "b.png")
    data = load_dataset(str(tmp_path), 4)
    assert f"only the first frame of {path} is read" in caplog.text and len(caplog.records) == 1
    assert data.all().images[:, 0, 0, 0].tolist() == [1, -1]
