"""One image file to pixels, whatever is in the file."""

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastgen.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # decoded by Pillow itself: no other program is started
_MAX_PIXELS = 2**26
_DAMAGE = (OSError, ValueError, SyntaxError, struct.error, OverflowError, EOFError, Image.DecompressionBombError)
_GREY = ("1", "L", "LA", "I", "F")


class DamagedImageError(DataError):
    """A file that is no image, or one that cannot or must not be decoded."""


def is_grey(path: Path) -> bool:
    """Whether the image has no colour, from its header.

    Raises:
        DamagedImageError: as `open_image` does.
    """
    with open_image(path) as image:
        return image.mode in _GREY or image.mode.startswith("I;")


def open_image(path: Path) -> Image.Image:
    """The image with its header read and its size found bearable; no pixel is decoded.

    Raises:
        DamagedImageError: not an image, damaged, or of more than 2^26 pixels.
        OSError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DamagedImageError(f"{path} is refused: it would unpack to more than {_MAX_PIXELS} pixels") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedImageError(f"{path} is not an image that can be read, or damaged: {error}") from error
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise DamagedImageError(
            f"{path} is refused: {image.width}x{image.height} is more than {_MAX_PIXELS} pixels; make it smaller"
        )
    return image


def read_image(path: Path, channels: int, *, image_size: int | None = None) -> np.ndarray:
    """The pixels of an image, upright, on white where it is transparent.

    Args:
        channels: 1 or 3; colour becomes grey, grey becomes colour.
        image_size: height and width, to which the image is scaled down and cut at its centre; None keeps its own.

    Returns:
        (channels, H, W), uint8.

    Raises:
        DamagedImageError: not an image, damaged, or too large to unpack.
        DataError: smaller than `image_size`.
        OSError: the file cannot be read.
    """
    with open_image(path) as image:
        if image_size is not None and min(image.size) < image_size:
            raise DataError(
                f"{path} is {image.width}x{image.height} pixels: too small for images of {image_size}x{image_size}; "
                "ask for smaller ones, or enlarge it"
            )
        try:
            if image_size is not None:
                image.draft(None, (image_size, image_size))  # a JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("L" if channels == 1 else "RGB")
            if image_size is not None:
                upright = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BICUBIC)
        except _DAMAGE as error:
            raise DamagedImageError(f"{path} is damaged: {error}") from error
        pixels = np.asarray(upright)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
