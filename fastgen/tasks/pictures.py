from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data import image_paths, is_grey, read_image, save_grid
from fastgen.data.decode import UnusableImageError
from fastgen.data.files import LeftOut
from fastgen.errors import DataError, FastgenError, UsageError


def transform_pictures(
    source: Path,
    out: Path,
    function: Callable[[Tensor], Tensor],
    channels: int,
    *,
    image_size: int | None = None,
    grey_as_colour: bool = False,
    strict: bool = False,
) -> list[Path]:
    """Applies a function to each picture in a folder and writes the results to another folder, as PNGs of the same
    names.

    A picture that cannot be read, or for which `function` fails, is named in the log and left out. A UsageError of
    `function` is raised: its arguments are wrong for every picture.

    Args:
        source: a folder of pictures, or one picture.
        out: folder to write to; created if missing.
        function: takes and returns an image (1, C, H, W) in [-1, 1].
        channels: 1 or 3, of the image that `function` takes; colour becomes grey.
        image_size: height and width to which each picture is scaled down and cropped; None keeps its own.
        grey_as_colour: a grey picture is given three equal channels; otherwise it is unusable where 3 are needed.
        strict: a picture that would be left out is an error.

    Returns:
        The files written.

    Raises:
        DataError: there is no picture, or `out` is their own folder, or a picture is unusable and `strict` is set or
            there is no usable one; the message names it.
        OSError: a file cannot be read or written.
        Exception: what `function` raises, if that is a UsageError, or if `strict` is set or no picture succeeds.
    """
    paths = [source] if source.is_file() else image_paths(source) if source.is_dir() else []
    if not paths:
        raise DataError(f"{source} does not exist" if not source.exists() else f"{source} holds no pictures")
    if out.resolve() == paths[0].parent.resolve():
        raise DataError(f"{out} holds the pictures themselves: write to another folder")
    stems = Counter(path.stem for path in paths)
    strict = strict or len(paths) == 1
    left_out = LeftOut(strict)
    failure: Exception | None = None  # raised by the function
    written = []
    for path in paths:
        try:
            if channels == 3 and not grey_as_colour and is_grey(path):
                raise UnusableImageError(f"{path} is grey, but the model needs colour")
            pixels = torch.from_numpy(read_image(path, channels, image_size=image_size).copy())
        except UnusableImageError as error:
            left_out.add(path, error)
            continue
        try:
            image = function(pixels[None].float() / 127.5 - 1)
            if not image.isfinite().all():
                raise FastgenError(f"{path}: the model's output for it is not finite")
        except UsageError:
            raise
        except Exception as error:  # any function may fail for pictures of some sizes only
            if strict:
                raise
            failure = failure or error
            left_out.add(path, UnusableImageError(f"{path}: {type(error).__name__}: {error}"))
            continue
        target = out / f"{path.stem if stems[path.stem] == 1 else path.name}.png"
        save_grid(image, target, padding=0)
        written.append(target)
    if not written and failure:
        raise failure
    if not written:
        raise DataError(f"none of the {len(paths)} pictures in {source} can be used: {left_out.first}")
    return written
