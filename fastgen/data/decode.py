"""Decodes one image file, whatever it contains."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from fastgen.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # decoded by Pillow itself: no other program is started
_MAX_PIXELS = 2**26
_DAMAGE = (OSError, ValueError, SyntaxError, struct.error, OverflowError, EOFError, Image.DecompressionBombError)
_GREY = ("1", "L", "LA", "La", "I", "F")


class UnusableImageError(DataError):
    """A file that cannot be used as an image: it is not one, is damaged, too large or too small, or the range of its
    values is unknown.

    A data set leaves such a file out, or raises this error if it is strict.
    """


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    grey: bool
    """It has no colour; a palette counts as colour."""
    frames: bool
    """It has several frames, of which only the first is read."""


def read_header(path: Path, image_size: int | None = None) -> Header:
    """The header of an image that `read_image` may be able to read at the same `image_size`.

    Raises:
        UnusableImageError: not an image, damaged, too large to unpack, or smaller than `image_size`.
        OSError: the file cannot be read.
    """
    with open_image(path) as image:
        _check(path, image, image_size)
        return Header(image.mode in _GREY or image.mode.startswith("I;"), getattr(image, "is_animated", False))


def is_grey(path: Path) -> bool:
    """Whether the image has no colour, from its header.

    Raises:
        UnusableImageError: as `open_image` does.
    """
    return read_header(path).grey


def open_image(path: Path) -> Image.Image:
    """Opens an image and checks its size; no pixel is decoded.

    Raises:
        UnusableImageError: not an image, damaged, or of more than 2^26 pixels.
        OSError: the file cannot be read.
    """
    try:
        image = Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnusableImageError(f"{path} is refused: it would decode to more than {_MAX_PIXELS} pixels") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnusableImageError(f"{path} is not an image, or damaged: {error}") from error
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise UnusableImageError(
            f"{path} is refused: {image.width}x{image.height} is more than {_MAX_PIXELS} pixels; make it smaller"
        )
    return image


def read_image(path: Path, channels: int, *, image_size: int | None = None) -> np.ndarray:
    """The pixels of an image, rotated upright, on white where it is transparent; of several frames the first.

    Integers of up to 16 bits are scaled from their whole range, floating-point values from [0, 1].

    Args:
        channels: 1 or 3; colour is converted to grey, grey to three equal channels.
        image_size: height and width to which the image is scaled down and cropped at its centre; None keeps its own.

    Returns:
        (channels, H, W), uint8.

    Raises:
        UnusableImageError: not an image, damaged, too large to decode, smaller than `image_size`, or with values whose
            white is unknown: signed ones, 32 bits, or floating-point values outside of [0, 1].
        OSError: the file cannot be read.
    """
    with open_image(path) as image:
        _check(path, image, image_size)
        try:
            if image_size is not None:
                image.draft(None, (image_size, image_size))  # a JPEG is decoded at a fraction of its size
            upright = _with_8_bits(path, image, ImageOps.exif_transpose(image))
            if upright.has_transparency_data:
                upright = upright.convert("LA") if upright.mode == "La" else upright
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("L" if channels == 1 else "RGB")
            if image_size is not None:
                upright = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BICUBIC)
        except _DAMAGE as error:
            raise UnusableImageError(f"{path} is damaged, or of a kind that cannot be decoded: {error}") from error
        pixels = np.asarray(upright)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check(path: Path, image: Image.Image, image_size: int | None) -> None:
    """Raises UnusableImageError for an image that the header alone shows to be unusable."""
    if image_size is not None and min(image.size) < image_size:
        raise UnusableImageError(
            f"{path} is {image.width}x{image.height} pixels: too small for images of {image_size}x{image_size}; "
            "choose a smaller image_size, or enlarge it"
        )
    if image.mode == "LAB":
        raise UnusableImageError(f"{path} is refused: its colours are CIELAB; save it as RGB")
    signed, bits = _tag(image, SAMPLEFORMAT, 1) != 1, _bits(image)
    if image.mode != "F" and (signed or bits > 16):
        raise UnusableImageError(
            f"{path} is refused: it has {'signed' if signed else 'unsigned'} values of {bits} bits, and which one is "
            "white is unknown; save it with unsigned values of 8 or 16 bits"
        )


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """A tag of a TIFF; the greatest if each channel has its own."""
    value: Any = getattr(image, "tag_v2", {}).get(tag, default)
    return max(value) if isinstance(value, tuple) else value


def _bits(image: Image.Image) -> int:
    return _tag(image, BITSPERSAMPLE, 16)


def _with_8_bits(path: Path, opened: Image.Image, image: Image.Image) -> Image.Image:
    """`image`, which was made from `opened`, with black at 0 and white at 255; modes that Pillow scales itself stay as
    they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels, white = np.asarray(image), 1 if image.mode == "F" else 2 ** _bits(opened) - 1
    if not 0 <= levels.min() <= levels.max() <= white:  # false for NaN too
        raise UnusableImageError(
            f"{path} is refused: its values run from {levels.min():.4g} to {levels.max():.4g}, but black is 0 and "
            f"white is {white}; scale them to that"
        )
    scaled = np.rint(levels * (255 / white))
    if _tag(opened, PHOTOMETRIC_INTERPRETATION, 1) == 0:  # white is zero
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[levels == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
