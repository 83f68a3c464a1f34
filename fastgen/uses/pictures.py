import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data import image_paths, is_grey, read_image, save_grid
from fastgen.data.decode import UnusableImageError
from fastgen.errors import DataError

_log = logging.getLogger(__name__)


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

    Args:
        source: a folder of pictures, or one picture.
        out: folder to write to; it is made.
        channels: 1 or 3, of the image that `function` takes; colour becomes grey.
        image_size: height and width, to which each picture is scaled down and cut; None keeps its own.
        grey_as_colour: a grey picture becomes one of three equal channels; otherwise it is an error.
        strict: a damaged picture is an error; otherwise it is named in the log and left out.

    Returns:
        The files written.

    Raises:
        DataError: no picture is there or none is good, `out` is where they are, or a picture is of no use; the message
            names it.
    """
    paths = [source] if source.is_file() else image_paths(source) if source.is_dir() else []
    if not paths:
        raise DataError(f"{source} is not there" if not source.exists() else f"{source} holds no pictures")
    if out.resolve() == paths[0].parent.resolve():
        raise DataError(f"{out} is where the pictures are: write to another folder")
    stems = Counter(path.stem for path in paths)
    written = []
    for path in paths:
        try:
            if channels == 3 and not grey_as_colour and is_grey(path):
                raise DataError(f"{path} is grey, and the model needs colour")
            pixels = torch.from_numpy(read_image(path, channels, image_size=image_size).copy())
        except UnusableImageError as error:
            if strict or len(paths) == 1:
                raise
            _log.warning("left out: %s", error)
            continue
        target = out / f"{path.stem if stems[path.stem] == 1 else path.name}.png"
        save_grid(function(pixels[None].float() / 127.5 - 1), target, padding=0)
        written.append(target)
    if not written:
        raise DataError(f"none of the {len(paths)} pictures in {source} can be read")
    return written
