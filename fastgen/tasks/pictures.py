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
    """Writes function(image), (1, C, H, W) in [-1, 1], of each picture in a folder into another, as a PNG of its name.

    A picture that cannot be read, or for which `function` fails, is named in the log and left out; the others are
    written. A UsageError of `function`, whose arguments cannot be meant for any picture, is raised.

    Args:
        source: a folder of pictures, or one picture.
        out: folder to write to; it is made.
        channels: 1 or 3, of the image that `function` takes; colour becomes grey.
        image_size: height and width, to which each picture is scaled down and cut; None keeps its own.
        grey_as_colour: a grey picture becomes one of three equal channels; otherwise it is of no use.
        strict: a picture that would be left out is an error.

    Returns:
        The files written.

    Raises:
        DataError: no picture is there, or `out` is where they are, or a picture is of no use; the message names it. The
            last if `strict`, for a single picture, or if there is no other.
        OSError: a file cannot be read or written.
        Exception: what `function` raises, if that is a UsageError, or `strict`, or for a single picture, or for all.
    """
    paths = [source] if source.is_file() else image_paths(source) if source.is_dir() else []
    if not paths:
        raise DataError(f"{source} is not there" if not source.exists() else f"{source} holds no pictures")
    if out.resolve() == paths[0].parent.resolve():
        raise DataError(f"{out} is where the pictures are: write to another folder")
    stems = Counter(path.stem for path in paths)
    strict = strict or len(paths) == 1
    left_out = LeftOut(strict)
    failure: Exception | None = None  # of the function
    written = []
    for path in paths:
        try:
            if channels == 3 and not grey_as_colour and is_grey(path):
                raise UnusableImageError(f"{path} is grey, and the model needs colour")
            pixels = torch.from_numpy(read_image(path, channels, image_size=image_size).copy())
        except UnusableImageError as error:
            left_out.add(path, error)
            continue
        try:
            image = function(pixels[None].float() / 127.5 - 1)
            if not image.isfinite().all():
                raise FastgenError(f"{path}: what the model makes of it is not finite")
        except UsageError:
            raise
        except Exception as error:  # of anybody's function, which may fail for pictures of some sizes alone
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
